"""The version of a finished run in the current registry; without a training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.common.errors import StoreUnavailable
from olora_ray.config.schema import Config
from olora_ray.pipeline import run as pipeline
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.retrain import recipe
from olora_ray.retrain import run as retraining
from olora_ray.tracking.aliases import Aliases
from tests import mlflow_database, registered, tiny


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Config of a run whose training ends immediately and registers a version."""
    found = tiny.config(
        run__storage=str(mlflow_database.place(tmp_path / "runs")), registry__model="m"
    )
    folder = RunFolder(found.folder())

    def run(_: Config, __: object, base: object) -> dict[str, Any]:
        assert base == "opened"  # the run does not open it again
        if folder.state().result is None:
            made = add(found, "ours")
            folder.write_result(result("ours", made))
        return folder.state().result or {}

    monkeypatch.setattr(pipeline, "run", run)
    registered.model(tmp_path / "runs", "m", 0)
    return found


def add(config: Config, run_id: str) -> str:
    """Create a version that the MLflow run has registered; return its number."""
    client = Aliases(f"sqlite:///{config.run.storage}/mlflow.db", "m").client
    return str(client.create_model_version("m", "/nowhere", run_id).version)


def result(run_id: str, version: str) -> dict[str, Any]:
    return {
        "run": "test",
        "mlflow": {"run_id": run_id},
        "registered": {"version": version},
        "best_step": 1,
    }


def trained(config: Config) -> tuple[str, str | None]:
    """Return number and MLflow run of the version that a night judges."""
    aliases = Aliases(f"sqlite:///{config.run.storage}/mlflow.db", "m")
    inputs: Any = SimpleNamespace(base="opened")
    version, _ = retraining._trained(config, {}, aliases, inputs)
    return version.number, version.run_id


def test_a_finished_run_whose_version_is_not_here_is_registered(config: Config) -> None:
    add(config, "of another model")
    RunFolder(config.folder()).write_result(
        result("ours", "1")
    )  # in another registry, or under another name
    assert trained(config) == trained(config) == ("2", "ours")

    Aliases(f"sqlite:///{config.run.storage}/mlflow.db", "m").client.delete_model_version("m", "2")
    assert trained(config) == ("3", "ours")


@pytest.mark.parametrize(
    ("error", "noted"), [(StoreUnavailable("away"), []), (OSError("a bug"), ["failed"])]
)
def test_a_night_that_is_to_be_called_again_has_not_failed(
    config: Config, monkeypatch: pytest.MonkeyPatch, error: Exception, noted: list[str]
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(recipe, "read_inputs", fails)
    with pytest.raises(type(error)):
        retraining.run(config)
    client = Aliases(f"sqlite:///{config.run.storage}/mlflow.db", "m").client
    experiments = [each.experiment_id for each in client.search_experiments()]
    assert [run.data.tags["olora.decision"] for run in client.search_runs(experiments)] == noted
