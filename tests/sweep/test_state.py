"""A search is resumed only by code that can read Tune's state; any other says so before anything starts."""

import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.sweep import run, settings, state, tuner
from olora_ray.sweep.callback import SweepCallback
from olora_ray.sweep.schedulers import scheduler
from olora_ray.sweep.space import Space
from tests import tiny

SEARCH = {"train.lr": {"loguniform": [1e-4, 1e-2]}, "train.clip": {"uniform": [0.5, 2.0]}}
SPACES = {
    "random": {"search": SEARCH},
    "tpe": {"search": SEARCH, "searcher": "tpe"},
    "population": {"search": SEARCH, "scheduler": {"kind": "population"}},
}
PICKLED = {
    "callback._live",
    "domain.Domain",
    "schedulers.Halving",
    "schedulers.Population",
    "schedulers._inside",
    "schedulers._redrawn",
    "space.Scheduler",
    "space.Space",
    "tuner._draw",
    "tuner._name",
    "tuner._suggested",
}
STATE = {"best", "ended", "since_better"}
"""Of the callback. Whoever has to change one of these raises FORMAT, so that searches under way are refused."""


def test_a_change_of_what_tune_pickles_changes_the_format(tmp_path: Path) -> None:
    found: set[str] = set()
    for tree in SPACES.values():
        space = Space.model_validate(tree)
        callback = SweepCallback(str(tmp_path), space)
        spec: Any = SimpleNamespace(
            space=space, train_spec=SimpleNamespace(config=tiny.config()), total=lambda: 12, folder=str(tmp_path)
        )
        parts = (callback, tuner._params(space), tuner._searcher(spec), scheduler(spec), tuner._name)
        found |= names_in(cloudpickle.dumps(parts))
        assert callback.get_state().keys() == STATE
    assert found == {f"olora_ray.sweep.{name}" for name in PICKLED}
    assert state.FORMAT == 2


def test_what_tune_unpickles_is_the_one_callback_with_the_limits_of_today(tmp_path: Path) -> None:
    """Tune pickles it twice, as callback and as stopper: the copy that stops must be the one that counts."""
    before = SweepCallback(str(tmp_path), Space.model_validate({**SPACES["random"], "patience": 5}))
    kept = cloudpickle.dumps({"callbacks": [before], "stop": before})
    today = SweepCallback(str(tmp_path), Space.model_validate({**SPACES["random"], "patience": 2}))
    restored = pickle.loads(kept)
    assert restored["callbacks"][0] is restored["stop"] is today
    moved = SweepCallback(str(tmp_path / "moved"), Space.model_validate(SPACES["random"]))
    assert pickle.loads(kept)["stop"] is moved  # the search lies elsewhere now
    today.since_better = 2
    assert restored["stop"].stop_all()
    assert today.over == "2 trials in a row have brought nothing better"


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Config, Space]:
    """The folder of an interrupted search with Tune's state, its config and space."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(settings.address, "find", lambda: "local")  # whatever runs on this machine
    space = Space.model_validate({**SPACES["random"], "metric": "train/loss"})
    config = override(tiny.config(), {"run.storage": str(tmp_path)})
    folder = Path(config.folder())
    (folder / "tune").mkdir(parents=True)
    (folder / "search.json").write_text(settings.description(config, space))
    (folder / "tune" / "tuner.pkl").write_bytes(pickle.dumps(SweepCallback(str(folder), space)))
    return folder, config, space


def test_an_interrupted_search_of_the_same_format_resumes(searched: tuple[Path, Config, Space]) -> None:
    folder, config, space = searched
    state.begin(str(folder))
    settings.check(config, space)
    assert state.can_resume(str(folder))


@pytest.mark.parametrize("note", [None, '{"format": 1}', '{"format": 3}', "damaged"])
def test_an_interrupted_search_of_another_format_is_refused(
    searched: tuple[Path, Config, Space], note: str | None
) -> None:
    folder, config, space = searched
    written_before_the_packages_were_renamed(folder)
    if note:
        (folder / "tune.json").write_text(note)
    with pytest.raises(UserError) as error:
        settings.check(config, space)
    text = str(error.value)
    assert text.startswith(f"run.name: {folder} holds an unfinished search of another version of olora_ray")
    assert "choose another run.name" in text
    assert "delete the folder" in text
    assert f"{folder}/trials" in text
    assert "\n" not in text


def test_a_finished_search_of_another_format_is_only_reported(searched: tuple[Path, Config, Space]) -> None:
    folder, config, space = searched
    written_before_the_packages_were_renamed(folder)
    (folder / "leaderboard.json").write_text("{}")
    settings.check(config, space)
    assert not state.can_resume(str(folder))


def test_a_search_that_ended_before_tune_wrote_anything_begins_anew(searched: tuple[Path, Config, Space]) -> None:
    folder, config, space = searched
    (folder / "tune" / "tuner.pkl").unlink()
    settings.check(config, space)
    assert state.can_resume(str(folder))


@pytest.mark.parametrize("note", ["", "{", "[]", '{"format": "x"}', '{"format": 1e999}'])
def test_a_format_that_is_none_is_that_of_another_version(note: str, searched: tuple[Path, Config, Space]) -> None:
    folder, _, _ = searched
    (folder / "tune.json").write_text(note)
    with pytest.raises(UserError, match="unfinished search of another version"):
        state.can_resume(str(folder))


def written_before_the_packages_were_renamed(folder: Path) -> None:
    """Tune's state as commit f8f54ed left it: a pickle that cannot be read any more."""
    file = folder / "tune" / "tuner.pkl"
    file.write_bytes(b"colora_ray.search.watch\nWatch\n.")
    with pytest.raises(ModuleNotFoundError, match=r"olora_ray\.search"):
        pickle.loads(file.read_bytes())


def names_in(data: bytes) -> set[str]:
    """Our own classes and functions that a pickle names."""
    found = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("olora_ray"):
                found.add(f"{module}.{name}")
            return super().find_class(module, name)

    Reader(io.BytesIO(data)).load()
    return found


def test_a_search_resumes_when_its_data_and_model_lie_elsewhere(searched: tuple[Path, Config, Space]) -> None:
    folder, config, space = searched
    state.begin(str(folder))
    places = {"data.train.0.path": "/elsewhere/rows.jsonl", "model.name": "/elsewhere/model"}
    settings.check(override(config, places), space)
    before = json.loads((folder / "search.json").read_text())
    before["config"] |= {"data.train.0.path": "/before/rows.jsonl", "model.name": "/before/model"}
    (folder / "search.json").write_text(json.dumps(before))  # as it was written when paths were compared
    settings.check(config, space)
    for text in (json.dumps({**before, "space": {}}), "{", "[1]"):
        (folder / "search.json").write_text(text)
        with pytest.raises(UserError, match="holds a search with different settings"):
            settings.check(config, space)


def test_a_search_of_other_contents_is_refused_before_work_is_shared(searched: tuple[Path, Config, Space]) -> None:
    folder, config, space = searched
    kept = settings.description(config, space, {"training data": "old", "base model": "base"})
    (folder / "search.json").write_text(kept)
    store: Any = tiny.store()
    spec = TrainSpec(config, BaseModel("m", "/m", "base"), "tokenizer", (0,), store, None)
    with pytest.raises(UserError, match=rf"{folder} was trained with another training data \(old then, list now\)"):
        run.share(spec, space, 0.0)
    assert (folder / "search.json").read_text() == kept
