"""A run's folder belongs to one config, and to the contents of its model and data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_ray.cluster.spec import TrainResult
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.decided import Decision
from olora_ray.config.load import load_config, override
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder, RunState
from olora_ray.train.checkpoint import TrainState
from tests import tiny
from tests.refused import refused
from tests.said import said


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.config(run__name="mine", run__storage=str(tmp_path / "runs"))


def check(config: Config) -> RunState:
    return RunFolder(config.folder()).check(config)


def begin(config: Config) -> RunFolder:
    """A run that has trained for a while."""
    RunFolder(config.folder()).check(config)
    folder = tiny.claimed(config)
    (Path(folder.checkpoints) / "step-0000000").mkdir(parents=True)
    return folder


def test_a_name_is_held_from_the_first_checkpoint_on(config: Config) -> None:
    check(config)
    assert list(Path(config.run.storage).iterdir()) == []
    tiny.claimed(config)
    check(
        override(config, {"adapter.rank": 8})
    )  # a run that has never trained does not hold its name
    folder = begin(config)
    check(config)
    assert (load_config(folder.settings), folder.root) == (config, f"{config.run.storage}/mine")


def test_what_was_decided_is_kept_with_its_reason(config: Config) -> None:
    asked = override(config, {"data.max_length": "auto", "cluster.workers": "auto"})
    decisions = {
        "data.max_length": Decision(640, "the longest of 9 rows has 600 tokens"),
        "cluster.workers": Decision(2, "without GPUs there are two"),
        "train.objective": Decision("pairs", "rows of data.train.0 are preference pairs"),
    }
    folder = begin(asked)
    folder.write_config(asked, decisions, folder.state())
    assert load_config(folder.settings) == asked
    kept = check(asked).kept
    assert kept.decision("data.max_length") == decisions["data.max_length"]
    check(override(asked, {"data.max_length": 640}))
    with refused("data.max_length was 640, is 512"):
        check(override(asked, {"data.max_length": 512}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter.targets", ["q_proj"]),
        ("data.train", [{"path": "unused.jsonl"}, {"path": "another.jsonl"}]),
    ],
)
def test_a_name_with_other_settings_is_refused(config: Config, field: str, value: Any) -> None:
    begin(config)
    with pytest.raises(UserError) as caught:
        check(override(config, {field: value}))
    message = str(caught.value)
    assert message.startswith("run.name: 'mine' exists with other settings (")
    assert field in message
    assert f"; set another run.name, remove run.name, or delete {config.folder()}" in message
    assert load_config(RunFolder(config.folder()).settings) == config


def ended(config: Config, step: int = 6, stale: int = 0) -> RunFolder:
    """A run that has ended after so many steps."""
    folder = begin(config)
    (Path(folder.checkpoints) / f"step-{step:07d}").mkdir()
    folder.write_training(TrainResult(state=TrainState(step=step, stale=stale)))
    folder.write_result({"steps": step, "metrics": {}})
    return folder


LONGER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"train.steps": 6}, {"train.steps": 12}),
    ({"train.epochs": 1}, {"train.epochs": 2}),
    ({"train.epochs": 1}, {"train.steps": 8}),
    ({"train.steps": 6}, {"train.steps": None, "train.epochs": 3}),
]


@pytest.mark.parametrize(("before", "after"), LONGER)
def test_a_run_may_be_made_longer_and_has_not_ended_then(
    config: Config, before: dict[str, Any], after: dict[str, Any]
) -> None:
    folder = ended(short := override(config, before))
    for _ in range(2):  # until it is claimed the shorter run is as it was, whatever was looked at
        longer = override(short, after)
        state = check(longer)
        assert (state.finished(longer), state.trained(longer)) == (None, None)
        assert state.finished(short) == {"steps": 6, "metrics": {}}
        assert state.trained(short)
    with said() as lines:
        folder.write_config(longer, {}, state)
        tiny.claimed(longer)
    assert len(lines) == 1
    assert "training continues after step 6 with the optimizer's state" in lines[0]
    state = folder.state()
    assert (state.result, state.training, load_config(folder.settings)) == (None, None, longer)


@pytest.mark.parametrize("written", range(5))
def test_a_run_that_is_killed_while_it_is_made_longer_is_one_of_the_two(
    config: Config, written: int
) -> None:
    folder = ended(short := override(config, {"train.steps": 6}))
    longer = override(short, {"train.steps": 12})
    state = check(longer)
    left, kill = iter(range(written)), KeyboardInterrupt()

    def limited(change: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if next(left, None) is None:
                raise kill
            change(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("remove", "write_text"):
            patch.setattr(storage, name, limited(getattr(storage, name)))
        with pytest.raises(KeyboardInterrupt):
            folder.write_config(longer, {}, state)
    for each in (short, longer):
        state = check(each)
        assert each is short or (state.finished(each), state.trained(each)) == (None, None)
    assert (state.finished(short) is None) == (written >= 3)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            {"train.steps": 6},
            {"train.steps": 5},
            "train.steps: 'mine' has already done 6 steps (train.steps was 6, is 5)",
        ),
        (
            {"train.steps": 6, "train.early_stop": 2},
            {"train.steps": 9},
            "train.early_stop: 'mine' has stopped early",
        ),
        (
            {"train.steps": 6},
            {"train.steps": 9, "train.lr": 1},
            "run.name: 'mine' exists with other settings (train.l",
        ),
    ],
)
def test_a_length_that_a_run_cannot_have_is_refused(
    config: Config, before: dict[str, Any], after: dict[str, Any], told: str
) -> None:
    folder = ended(short := override(config, before), stale=2)
    with pytest.raises(UserError) as caught:
        check(override(short, after))
    assert str(caught.value).startswith(told)
    assert folder.state().finished(short)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_to_be_longer(config: Config) -> None:
    short = override(config, {"train.steps": 6})
    storage.remove(ended(short).checkpoints)
    check(short)
    with refused("no checkpoint to resume from"):
        check(override(short, {"train.steps": 9}))


ELSEWHERE = {
    "data.chat_template": "/moved/own.jinja",
    "model.name": "/moved/model",
    "model.revision": "main",
    "data.train.0.path": "/moved/rows.jsonl",
    "data.train.0.only": ["/moved/rows.jsonl"],
}
CONTENTS = {
    "base model": "b" * 32,
    "tokenizer": "t" * 32,
    "training data": "d" * 32,
    "held-out data": "",
}


def trained(config: Config, identity: dict[str, str] = CONTENTS) -> RunFolder:
    """A run whose last two checkpoints say what they were trained with; the newest of them is damaged."""
    folder = begin(config)
    for step, text in ((1, json.dumps({"identity": identity})), (2, "{")):
        (Path(folder.checkpoints) / f"step-000000{step}").mkdir()
        (Path(folder.checkpoints) / f"step-000000{step}" / "state.json").write_text(text)
    return folder


def test_model_and_data_may_lie_elsewhere_if_they_are_the_same(config: Config) -> None:
    folder = trained(config)
    moved = override(config, ELSEWHERE)
    state = check(moved)
    assert state.moved(moved)
    assert not state.moved(config)
    state.require_same(moved, CONTENTS)
    state.require_same(moved, {"base model": CONTENTS["base model"]})
    folder.write_config(moved, {}, state)
    assert not folder.state().moved(moved)
    assert load_config(folder.settings).model.name == "/moved/model"


@pytest.mark.parametrize("what", CONTENTS)
def test_other_contents_are_refused_wherever_they_lie(config: Config, what: str) -> None:
    folder = trained(config)
    moved = override(config, {"data.train.0.path": "/moved/rows.jsonl"})
    for settings in (config, moved):
        with refused(f"another {what}") as caught:
            folder.state().require_same(settings, {**CONTENTS, what: "0" * 32})
        assert ("data.train.0.path was" in str(caught.value)) == (settings is moved)


def test_a_finished_run_without_checkpoints_is_still_bound_to_settings_and_contents(config):
    folder = tiny.claimed(config)
    folder.write_result({"base": {"digest": "base"}, "data": {"train": "rows", "eval": None}})
    with refused("adapter.rank was 4, is 8"):
        check(override(config, {"adapter.rank": 8}))
    moved = override(config, ELSEWHERE)
    state = check(moved)
    contents = {"base model": "base", "training data": "rows", "held-out data": ""}
    state.require_same(moved, contents)
    with refused("another training data"):
        state.require_same(moved, {**contents, "training data": "other"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cluster.max_failures", 0),
        ("train.activation_checkpointing", True),
        ("export.merged", False),
    ],
)
def test_what_does_not_change_the_numbers_may_change(
    config: Config, field: str, value: Any
) -> None:
    begin(config)
    changed = override(config, {field: value})
    check(changed)
    assert load_config(tiny.claimed(changed).settings) == changed


def test_a_folder_with_a_config_that_does_not_read_is_refused(config: Config) -> None:
    folder = begin(config)
    Path(folder.settings).write_text("run: {nam: x}\n")
    with refused(f"{folder.root} was written by another version"):
        check(config)


def test_exports_count_for_the_step_and_the_form_that_they_have(config: Config) -> None:
    folder, good = RunFolder(config.folder()), {"step": 6, "ok": True}
    assert folder.exported(config, 6) is None
    for field, value in (("export.merged", False), ("export.rank", 4)):
        other = override(config, {field: value})
        folder.write_parity(other, good)
        assert (folder.exported(other, 6), folder.exported(config, 6)) == (good, None)
        folder.write_parity(config, good)
        assert (folder.exported(config, 6), folder.exported(other, 6)) == (good, None)
    assert folder.exported(config, 4) is None
    folder.write_parity(config, {**good, "ok": False})
    assert folder.exported(config, 6) is None


@pytest.mark.parametrize("text", ["", "[]", "\xff"])
def test_a_damaged_note_of_ours_counts_as_missing(config: Config, text: str) -> None:
    folder = tiny.claimed(config)
    for name in READS:
        file = Path(folder.root) / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.encode("latin-1"))
    assert folder.exported(config, 6) is None
    assert folder.tracking_run("sqlite:///a.db", config.run.storage) is None
    assert (folder.state().result, folder.state().training) == (None, None)


READS: dict[str, Callable[[RunFolder], object]] = {
    "result.json": RunFolder.state,
    "training.json": RunFolder.state,
    "tracking.json": lambda folder: folder.tracking_run("sqlite:///a.db", "/runs"),
    "export/parity.json": lambda folder: folder.exported(tiny.config(), 6),
}


@pytest.mark.parametrize("name", READS)
def test_a_note_that_cannot_be_read_now_is_not_missing(config: Config, name: str) -> None:
    """Else a finished run would get a second MLflow run, and a second version."""
    folder = RunFolder(config.folder())
    (Path(folder.root) / name).mkdir(parents=True)
    with pytest.raises(OSError, match="is a directory"):
        READS[name](folder)


def test_the_tracking_run_is_remembered_for_its_server_without_a_password(config: Config) -> None:
    folder, root, uri = (
        RunFolder(config.folder()),
        config.run.storage,
        "postgresql://ann:c4n4ry@db/mlflow",
    )
    assert folder.tracking_run(uri, root) is None
    folder.keep_tracking_run(uri, root, "abc")
    assert folder.tracking_run(uri, root) == "abc"
    for other in ("postgresql://ann:c4n4ry@other/mlflow", "sqlite:///a.db"):
        assert folder.tracking_run(other, root) is None
    assert all(
        "c4n4ry" not in file.read_text() for file in Path(folder.root).rglob("*") if file.is_file()
    )


def test_the_tracking_run_is_remembered_when_the_storage_with_its_database_is_moved(
    config: Config,
) -> None:
    before = Path(config.run.storage)
    RunFolder(config.folder()).keep_tracking_run(
        f"sqlite:///{before}/mlflow.db", str(before), "run-1"
    )
    now = before.rename(before.parent / "now")
    moved = RunFolder(f"{now}/mine")
    assert moved.tracking_run(f"sqlite:///{now}/mlflow.db", str(now)) == "run-1"
    assert moved.tracking_run(f"sqlite:///{before}/mlflow.db", str(now)) is None
