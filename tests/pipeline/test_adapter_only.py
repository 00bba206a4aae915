"""An adapter-only version: registered, loaded by MLflow and PEFT, evaluated, continued, promoted, rolled back."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.evaluation import held_out, targets
from olora_ray.pipeline.base import Base, find_model
from olora_ray.retrain import compare
from olora_ray.tracking import models
from olora_ray.tracking.checksums import RUN, Version
from olora_ray.tracking.client import connect
from olora_ray.tracking.start import resolve_uri
from tests import export_parts, finished_run
from tests.finished_run import FinishedRun
from tests.refused import refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """An adapter-only run with version 1 of `small`, alias candidate."""
    torch.set_num_threads(1)
    found = finished_run.make(tmp_path_factory.mktemp("run"), export={"merged": False})
    assert found.registered() == "1"
    return found


@pytest.fixture(autouse=True)
def mlflow_there(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", resolve_uri(run.config))


def artifacts(run: FinishedRun, number: str = "1") -> Path:
    return Path(connect(resolve_uri(run.config)).get_model_version("small", number).source)


@pytest.fixture
def spoilt(run: FinishedRun) -> Iterator[Path]:
    """The artifact folder of version 1, put back afterwards."""
    place = artifacts(run)
    kept = shutil.copytree(place, place.with_name("kept"))
    yield place
    shutil.rmtree(place)
    kept.rename(place)


@pytest.fixture
def base(run: FinishedRun) -> Iterator[Path]:
    """The folder of the base model, put back afterwards."""
    place = run.case.base
    kept = shutil.copytree(place, place.with_name("kept"))
    yield place
    shutil.rmtree(place, ignore_errors=True)
    kept.rename(place)


def logits(target: targets.Target) -> torch.Tensor:
    return export_parts.logits(
        held_out.load_adapted(target.base, target.adapter, target.config, torch.device("cpu"))
    )


def named(run: FinishedRun, name: str = "models:/small/1") -> Config:
    return override(run.config, {"model.name": name})


def test_the_version_has_no_weights_of_the_base(run: FinishedRun) -> None:
    folder = artifacts(run)
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
    assert names == {"peft/adapter_model.safetensors"}
    assert not Path(run.folder.merged).exists()
    assert (folder / "components" / "tokenizer" / "tokenizer.json").is_file()


def test_mlflow_loads_base_and_adapter_and_generates(run: FinishedRun) -> None:
    import mlflow.transformers

    pipeline = mlflow.transformers.load_model("models:/small@candidate")
    assert type(pipeline.model).__name__ == "PeftModelForCausalLM"
    torch.testing.assert_close(export_parts.logits(pipeline.model), run.case.logits, **CLOSE)
    (answer,) = pipeline(
        [{"role": "user", "content": "after 3?"}], max_new_tokens=4, do_sample=False
    )
    assert answer["generated_text"][-1]["role"] == "assistant"


def test_mlflow_loads_it_onto_a_copy_of_the_base_elsewhere(
    run: FinishedRun, base: Path, tmp_path: Path
) -> None:
    import mlflow.transformers

    elsewhere = shutil.move(base, tmp_path / "elsewhere")
    pipeline = mlflow.transformers.load_model("models:/small/1", base_model_path=str(elsewhere))
    torch.testing.assert_close(export_parts.logits(pipeline.model), run.case.logits, **CLOSE)


def test_where_the_storage_has_an_address_the_adapter_is_put_there_for_all_nodes(
    run: FinishedRun, tmp_path: Path
) -> None:
    found = targets.resolve(
        "models:/small/1", override(run.config, {"run.storage": f"file://{tmp_path}"})
    )
    assert found.adapter.startswith(f"file://{tmp_path}/adapters/small-1-")
    torch.testing.assert_close(logits(found), run.case.logits, **CLOSE)


class Opened(NamedTuple):
    config: AnyConfig
    base: Base
    adapter: str | None


def opened(config: Config, version: Version) -> Opened:
    base: Any = None  # of candidates only
    return Opened(*compare._opened(base, config, version))


def test_the_gate_compares_it_with_a_merged_version(run: FinishedRun, tmp_path: Path) -> None:
    """Both see the same tokens and are the same model, and the adapter needs no merging."""
    number = finished_run.make(tmp_path, registry__alias="merged").registered()
    alone, merged = (opened(run.config, run.aliases.version(each)) for each in ("1", number))
    assert (alone.adapter is None, merged.adapter is None) == (False, True)
    assert alone.base.spec.digest == merged.base.spec.digest
    both = [
        targets.Target("", each.base.model, each.adapter, each.config) for each in (alone, merged)
    ]
    torch.testing.assert_close(logits(both[0]), logits(both[1]), **CLOSE)


def exported(made: FinishedRun, number: str, storage_root: Path) -> Path:
    """The run's folder in another storage, with what the gate reads there."""
    folder = storage_root / "exported"
    shutil.copytree(made.folder.merged, folder / "export" / "merged")
    text = json.dumps({"registered": {"model": "small", "version": int(number), "alias": "a"}})
    (folder / "result.json").write_text(text)
    return folder


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_merged_version_is_read_from_its_run_folder_by_all_nodes(
    run: FinishedRun, tmp_path: Path, scheme: str
) -> None:
    """Not from a copy of MLflow's files, unless the folder was deleted or has another version since."""
    made = finished_run.make(tmp_path / "run", registry__alias="by-all")
    root = tmp_path / "storage"
    number = made.registered()
    folder = exported(made, number, root)
    version = run.aliases.version(number)
    version = replace(version, tags={**version.tags, RUN: f"{scheme}{folder}"})
    config = override(run.config, {"run.storage": f"{scheme}{root}"})
    merged = f"{scheme}{folder}/export/merged"
    assert opened(config, version).config.model.name == merged
    assert not (root / "models").exists()
    (folder / "result.json").write_text("{}")  # it is trained longer
    found = opened(config, version)
    assert found.config.model.name != merged
    target = targets.Target("", found.base.model, None, found.config)
    torch.testing.assert_close(logits(target), run.case.logits, **CLOSE)
    if scheme:
        (copy,) = (root / "models").iterdir()
        assert found.config.model.name == f"file://{copy}"
        (copy / "config.json").write_text("{}")
        with pytest.raises(UserError):
            opened(config, version)


def test_as_a_base_it_is_merged_once(run: FinishedRun) -> None:
    first = find_model(named(run))
    files = {file: file.stat().st_mtime_ns for file in Path(first.folder).iterdir()}
    assert find_model(named(run, "models:/small@candidate")).digest == first.digest
    assert {file: file.stat().st_mtime_ns for file in Path(first.folder).iterdir()} == files
    found = targets.Target("merged", first, None, named(run))
    torch.testing.assert_close(logits(found), run.case.logits, **CLOSE)
    assert first.digest != run.spec.base.digest


@pytest.mark.parametrize(
    "name", ["peft/adapter_model.safetensors", "peft/adapter_config.json", "MLmodel"]
)
def test_a_damaged_adapter_is_one_line(run: FinishedRun, spoilt: Path, name: str) -> None:
    (spoilt / name).write_bytes((spoilt / name).read_bytes()[:-1] + b"x")
    for use in (
        lambda: find_model(named(run)),
        lambda: targets.resolve("models:/small/1", run.config),
        lambda: run.aliases.promote("1", "by hand"),
    ):
        with refused(f"small version 1: {name} was changed"):
            use()
    assert "champion" not in run.aliases.current()


def test_a_base_with_other_files_is_one_line(run: FinishedRun, base: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    with refused(f"small version 1 is an adapter of {base}, which has changed"):
        targets.resolve("models:/small/1", run.config)


def test_a_base_that_was_moved_is_one_line(run: FinishedRun, base: Path, tmp_path: Path) -> None:
    shutil.move(base, tmp_path / "moved")
    with refused("small version 1 is an adapter of"):
        targets.resolve("models:/small/1", run.config)


@pytest.fixture
def hub(run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base as the hub's client keeps `org/tiny` on a machine that is offline."""
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(run.case.base, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots" / COMMIT


def from_hub(run: FinishedRun, name: str) -> FinishedRun:
    config = override(run.config, {"model.name": "org/tiny", "registry.model": name})
    return replace(run, spec=replace(run.spec, config=config, base=find_model(config)))


def test_a_base_of_the_hub_is_kept_by_id_and_commit(run: FinishedRun, hub: Path) -> None:
    import mlflow.transformers
    from mlflow.models import Model

    from_hub(run, "hubs").registered()
    found = models.find("models:/hubs/1", resolve_uri(run.config), Path(run.config.run.storage))
    assert (found.base.name, found.base.revision, found.base.on_hub) == ("org/tiny", COMMIT, True)
    flavour = Model.load(str(found.folder.parent)).flavors["transformers"]
    assert (flavour["source_model_name"], flavour["source_model_revision"]) == ("org/tiny", COMMIT)
    assert "local_base_model_path" not in flavour
    pipeline = mlflow.transformers.load_model("models:/hubs/1")
    torch.testing.assert_close(export_parts.logits(pipeline.model), run.case.logits, **CLOSE)
    shutil.move(found.base.folder, hub.with_name("moved"))
    shutil.copytree(hub.with_name("moved"), hub)  # fetched again
    target = targets.resolve("models:/hubs/1", run.config)
    assert (target.config.model.name, target.config.model.revision) == ("org/tiny", COMMIT)
