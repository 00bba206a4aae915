"""A moved or copied storage: MLflow reads and writes artifacts there, and nowhere else."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils

from olora_ray.config.schema import Config
from olora_ray.tracking import models
from olora_ray.tracking.moved_storage import relocate_artifacts
from olora_ray.tracking.start import mlflow_run
from pipelines import registry
from tests import mlflow_database, tiny
from tests.refused import refused
from tests.tracking.test_mlflow_run import Ids


def settings(place: Path) -> Config:
    return tiny.config(run__storage=str(place))


@pytest.fixture
def ids() -> Ids:
    """The ids of the run, under any address."""

    class Same(Ids):
        def tracking_run(self, uri: str, storage_root: str) -> str | None:
            return next(iter(self.values()), None)

    return Same()


def tracked(place: Path, ids: Ids) -> str:
    """A run with an artifact, a model and a version of it; returns the folder of its artifacts."""
    utils._artifact_repos_cache.clear()  # as in a new process
    with mlflow_run(settings(place), {}, ids, {}) as tracker:
        tracker.text("hello", "note.txt")
        client = tracker.client()
        run = client.get_run(tracker.run_id)
        if not client.search_registered_models():
            model = client.create_logged_model(run.info.experiment_id, "m", tracker.run_id)
            client.create_registered_model("m")
            client.create_model_version(
                "m", model.artifact_location, tracker.run_id, model_id=model.model_id
            )
        return str(run.info.artifact_uri)


@pytest.mark.parametrize("copied", [False, True])
def test_the_run_continues_where_the_storage_lies_now(
    tmp_path: Path, ids: Ids, copied: bool
) -> None:
    before, now = mlflow_database.place(tmp_path / "before"), tmp_path / "now"
    first = tracked(before, ids)
    assert first.startswith(f"{before}/mlartifacts/")
    (shutil.copytree if copied else shutil.move)(before, now)
    (Path(first) / "note.txt").unlink(missing_ok=True)
    with refused("olora-ray registry moved"):
        tracked(now, ids)
    registry.main(["moved", str(before), str(now)])
    moved = tracked(now, ids)
    assert moved == first.replace(str(before), str(now))
    assert (Path(moved) / "note.txt").read_text() == "hello"
    assert not (Path(first) / "note.txt").exists()
    assert before.exists() is copied
    (version,) = MlflowClient(f"sqlite:///{now}/mlflow.db").search_model_versions()
    assert version.source.startswith(f"{now}/mlartifacts/")
    with refused("no artifact"):
        registry.main(["moved", str(before), str(now)])


def test_a_registered_model_is_found_where_the_storage_lies_now(tmp_path: Path, ids: Ids) -> None:
    """Even before the first run there, because that run may use it as its base model."""
    before, now = mlflow_database.place(tmp_path / "before"), tmp_path / "now"
    tracked(before, ids)
    [version] = MlflowClient(f"sqlite:///{before}/mlflow.db").search_model_versions()
    Path(version.source).mkdir(parents=True)
    (Path(version.source) / "config.json").write_text("{}")
    shutil.move(before, now)
    config = tiny.config(run__storage=str(now), model__name="models:/m/1")
    with refused("olora-ray registry moved"):
        models.of_config(config)
    registry.main(["moved", str(before), str(now)])
    found = models.of_config(config)
    assert str(found.folder) == version.source.replace(str(before), str(now))


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(tmp_path: Path, ids: Ids) -> None:
    shared, own = mlflow_database.place(tmp_path / "shared"), tmp_path / "own"
    config = tiny.config(run__storage=str(own), tracking__uri=f"sqlite:///{shared}/mlflow.db")
    with mlflow_run(config, {}, ids, {}) as tracker:
        tracker.text("hello", "note.txt")
    assert tracked(shared, ids).startswith(f"{own}/mlartifacts/")


def test_a_storage_that_is_reached_by_two_paths_was_not_moved(tmp_path: Path, ids: Ids) -> None:
    storage = mlflow_database.place(tmp_path / "storage")
    (tmp_path / "link").symlink_to(storage)
    first = tracked(storage, ids)
    assert tracked(tmp_path / "link", ids) == first


def test_a_database_that_is_no_sqlite_file_is_not_corrected(tmp_path: Path) -> None:
    with refused("only an SQLite database"):
        relocate_artifacts("/a", "/b", "http://mlflow:5000")
    with refused("mlflow.db is missing"):
        relocate_artifacts("/a", "/b", f"sqlite:///{tmp_path}/mlflow.db")
