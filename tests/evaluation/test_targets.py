"""A name means the same model whether it is a run, a checkpoint, an adapter or a merged folder."""

import shutil
from pathlib import Path

import pytest
import torch

from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.cluster.decide import LENGTH
from olora_ray.config import command_line
from olora_ray.config.decided import Decision
from olora_ray.config.load import build, dump, override
from olora_ray.config.schema import Config, EvaluationConfig
from olora_ray.evaluation import held_out, targets
from olora_ray.model.source import obtain
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tracking.start import resolve_uri
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from tests import export_parts, tiny
from tests.pipelines.project import settings
from tests.refused import refused
from tests.said import said

STEP = 4


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> export_parts.Case:
    folder = tmp_path_factory.mktemp("case") / "base"
    found = export_parts.make_case(folder, tiny.llama(), config(folder, folder.parent).adapter)
    export_parts.save_tokenizer(folder)
    return found


@pytest.fixture
def run(case: export_parts.Case, tmp_path: Path) -> Path:
    """A run folder with one checkpoint, whose best adapter is of an earlier step: no change at all."""
    mine = config(case.base, tmp_path)
    tiny.claimed(mine)
    state = TrainState(step=STEP, best_loss=1.0, best_step=2)
    best = {
        f"{name}.{part}": torch.zeros_like(getattr(item, part))
        for name, item in case.adapter.items()
        for part in ("da", "db")
    }
    identity = {"base model": obtain(mine).digest}
    root = Path(mine.folder())
    checkpoint.save(
        root / "checkpoints" / f"step-{STEP:07d}",
        case.adapter,
        best,
        {},
        state,
        identity,
        dump(mine),
    )
    return root


def config(base: Path, folder: Path) -> Config:
    return build(settings(folder, base))


def logits(name: str | Path, shared: Config | None = None) -> torch.Tensor:
    shared = shared or targets.settings([str(name)], None, {})
    found = targets.resolve(str(name), shared)
    return export_parts.logits(
        held_out.load_adapted(found.base, found.adapter, found.config, torch.device("cpu"))
    )


def test_models_are_measured_on_the_weights_that_they_are_exported_for(
    case: export_parts.Case, tmp_path: Path
) -> None:
    mine = override(config(case.base, tmp_path), {"model.quantization": "fp8"})
    tiny.claimed(mine)
    (Path(mine.folder()) / "checkpoints").mkdir()
    with said() as lines:
        found = targets.settings([mine.folder()], None, {})
    assert found == override(mine, {"model.quantization": "none"})
    assert len(lines) == 1
    assert lines[0].startswith("model.quantization=fp8: ignored")
    # Where nobody has asked for it, as the gate of a retraining, too.
    loaded = held_out.load_adapted(obtain(mine), None, mine, torch.device("cpu"))
    assert torch.equal(
        export_parts.logits(loaded),
        export_parts.logits(held_out.load_adapted(obtain(mine), None, found, torch.device("cpu"))),
    )


def test_a_config_with_an_automatic_length_has_the_one_that_its_run_decided(
    case: export_parts.Case, tmp_path: Path
) -> None:
    mine = override(config(case.base, tmp_path), {LENGTH: "auto"})
    (tmp_path / "my_run.yaml").write_text(dump(mine))
    folder = RunFolder(mine.folder())
    for decisions, length in (({}, "auto"), ({LENGTH: Decision(192, "of the rows")}, 192)):
        folder.write_config(mine, decisions, folder.state())
        # The base model, which belongs to no run, beside that of a run.
        for file in (tmp_path / "my_run.yaml", Path(folder.settings)):
            found = targets.settings([str(case.base)], str(file), {})
            assert found.data.max_length == length


def test_a_checkpoint_is_the_adapter_of_its_step_and_a_run_without_exports_its_best(
    case: export_parts.Case, run: Path
) -> None:
    torch.testing.assert_close(
        logits(run / "checkpoints" / f"step-{STEP:07d}"), case.logits, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        logits(run), logits(case.base, targets.settings([str(run)], None, {}))
    )


def test_a_run_with_exports_is_its_merged_model_wherever_it_was_moved(
    case: export_parts.Case, run: Path
) -> None:
    moved = run.rename(run.with_name("moved"))
    case.write_merged(moved / "export" / "merged")
    (moved / "result.json").write_text("{}")
    assert not torch.allclose(logits(moved), case.logits, atol=1e-3)  # an empty result is none
    (moved / "result.json").write_text('{"run": "small"}')
    torch.testing.assert_close(logits(moved), case.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_an_exported_adapter_finds_its_base(
    case: export_parts.Case, run: Path, tmp_path: Path, inside: bool
) -> None:
    place = (run / "export" if inside else tmp_path) / "adapter"
    write_adapter(
        case.adapter, case.settings, "gone" if inside else str(case.base), place, case.model
    )
    shared = None if inside else targets.settings([str(place)], None, {"model.dtype": "float32"})
    torch.testing.assert_close(logits(place, shared), case.logits, atol=1e-4, rtol=1e-4)


def test_settings_are_those_of_the_run_with_changes(run: Path) -> None:
    for name in (run, run / "checkpoints" / f"step-{STEP:07d}", run / "export" / "adapter"):
        name.mkdir(parents=True, exist_ok=True)
        found = targets.settings(["org/base", str(name)], None, {"evaluation.rows": 3})
        assert (found.data.max_length, found.evaluation.rows) == (64, 3)
        assert targets.run_of(str(name)) == str(run)
    assert targets.run_of("org/base") is None


def test_a_scorer_in_python_counts_only_from_this_call(
    case: export_parts.Case, tmp_path: Path
) -> None:
    """Others may write in a run folder, and a scorer's module runs as soon as it is imported."""
    mine = override(config(case.base, tmp_path), {"evaluation.scorer": "os:getcwd"})
    tiny.claimed(mine)
    (Path(mine.folder()) / "checkpoints").mkdir()
    with refused("evaluation.scorer"):
        targets.settings([mine.folder()], None, {})
    for scorer in ("os:getcwd", "exact_match", None):
        found = targets.settings([mine.folder()], None, {"evaluation.scorer": scorer})
        assert found.evaluation.scorer == scorer
    file = tmp_path / "own.yaml"
    file.write_text(dump(mine))
    assert targets.settings([mine.folder()], str(file), {}).evaluation.scorer == "os:getcwd"


def test_a_storage_that_was_moved_is_written_to_where_it_lies_now(
    run: Path, tmp_path: Path
) -> None:
    storage = run.parent
    assert targets.settings([str(run)], None, {}).run.storage == str(storage)
    moved = storage.rename(tmp_path / "elsewhere") / run.name
    assert targets.settings([str(moved)], None, {}).run.storage == str(tmp_path / "elsewhere")


def test_what_the_gate_asks_for_need_not_be_measured(
    case: export_parts.Case, tmp_path: Path
) -> None:
    """`--scorer` with another scorer than the gate's was once refused, and so were rows without the gate's column."""
    asked = {
        "gate.metric": "eval/exact_match",
        "gate.and": [{"metric": "eval/exact_match", "at_least": 0.5}],
    }
    mine = override(config(case.base, tmp_path), {**asked, "gate.group": "user"})
    tiny.claimed(mine)
    (Path(mine.folder()) / "checkpoints").mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(dump(mine))
    for given in (None, str(file)):
        for changes in (
            {"evaluation.scorer": "json_fields"},
            {"evaluation.scorer": None},
            {"evaluation.rows": 0},
        ):
            found = targets.settings([mine.folder()], given, changes)
            assert isinstance(found, Config)
            assert (found.gate.metric, found.gate.conditions, found.gate.group) == (
                "auto",
                (),
                "user",
            )


def test_a_model_of_no_run_has_settings_without_a_training(tmp_path: Path) -> None:
    found = targets.settings(
        ["org/base", "org/other"], None, {"run.storage": str(tmp_path), "cluster.workers": 3}
    )
    assert isinstance(found, EvaluationConfig)
    assert (found.model.name, found.cluster.workers, found.data.holds_out()) == (
        "org/base",
        3,
        False,
    )
    assert resolve_uri(override(found, {"tracking.uri": "http://server"})) == "http://server"
    held_out = targets.settings(["org/base"], None, {"data.eval": [{"path": "rows.jsonl"}]})
    assert held_out.data.holds_out()
    assert held_out.data.eval[0].path == str(Path.cwd() / "rows.jsonl")


def test_a_base_that_has_changed_since_is_refused(case: export_parts.Case, tmp_path: Path) -> None:
    mine = config(case.base, tmp_path)
    step = Path(mine.folder()) / "checkpoints" / f"step-{STEP:07d}"
    checkpoint.save(
        step, case.adapter, None, {}, TrainState(step=STEP), {"base model": "other"}, dump(mine)
    )
    with refused("model.revision"):
        targets.resolve(str(step), mine)


@pytest.mark.parametrize("name", ["runs/nosuch", "nowhere", "/no/such/folder"])
def test_a_path_to_nothing_is_told_before_anything_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    with refused(f"{name}: no such file or folder") as caught:
        targets.settings(["org/model", name], None, {})
    assert str(caught.value).endswith("has quickstart") is (name == "runs/nosuch")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with refused(f"{name}: no such file or folder"):
        targets.settings([name], None, {})


@pytest.mark.parametrize("name", ["org/model", "package://yaml/x"])
def test_a_name_that_may_lead_somewhere_is_not_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert targets.settings([name], None, {}).model.name == name


def test_a_job_finds_what_a_job_before_it_has_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's own folder has no runs; the name was once taken for a hub id."""
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    kept = tmp_path / "home" / "olora_ray" / "runs" / "r"
    shutil.copytree(run, kept)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(job)
    assert targets.run_of("runs/r") == str(kept)
    found = override(config(tmp_path / "base", tmp_path), {"train.start": "runs/r"})
    assert command_line.resolved(found, job).train.start == str(kept)
    shutil.copytree(run, job / "runs" / "r")
    assert targets.run_of("runs/r") == str(job / "runs" / "r")
