"""A search is resumed only by code that can read Tune's state; any other says so before anything starts."""

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.sweep import schedulers, settings, state, tuner
from olora_ray.sweep.callback import SweepCallback
from olora_ray.sweep.space import Space
from tests import tiny

SEARCH = {"train.lr": {"loguniform": [1e-4, 1e-2]}, "train.clip": {"uniform": [0.5, 2.0]}}
SPACES = {
    "random": {"search": SEARCH},
    "tpe": {"search": SEARCH, "searcher": "tpe"},
    "population": {"search": SEARCH, "scheduler": {"kind": "population"}},
}
PICKLED = {
    "callback.SweepCallback",
    "space.Domain",
    "space.Scheduler",
    "space.Space",
    "tuner._draw",
    "tuner._inside",
    "tuner._name",
    "tuner._redrawn",
    "tuner._suggested",
}
ATTRIBUTES = {"best", "folder", "over", "since_better", "space", "total", "_cleaned_at", "_ended"}
"""Of the callback. Whoever has to change one of these raises FORMAT, so that searches under way are refused."""


def test_a_change_of_what_tune_pickles_changes_the_format() -> None:
    found: set[str] = set()
    for tree in SPACES.values():
        space = Space.model_validate(tree)
        callback = SweepCallback("runs/search", space, 12)
        spec: Any = SimpleNamespace(space=space, train_spec=SimpleNamespace(config=tiny.config()), total=lambda: 12)
        parts = (callback, tuner._params(space), tuner._searcher(spec), tuner._scheduler(spec), tuner._name)
        found |= names_in(cloudpickle.dumps(parts))
        assert vars(callback).keys() == ATTRIBUTES
    assert found == {f"olora_ray.sweep.{name}" for name in PICKLED}
    assert state.FORMAT == 1


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Config, Space]:
    """The folder of an interrupted search with Tune's state, its config and space."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(run.address, "find", lambda: "local")  # whatever runs on this machine
    space = Space.model_validate({**SPACES["random"], "metric": "train/loss"})
    config = override(tiny.config(), {"run.storage": str(tmp_path)})
    folder = Path(config.folder())
    (folder / "tune").mkdir(parents=True)
    (folder / "search.json").write_text(run._description(config, space))
    (folder / "tune" / "tuner.pkl").write_bytes(pickle.dumps(SweepCallback(str(folder), space, 12)))
    return folder, config, space


def test_an_interrupted_search_of_the_same_format_resumes(searched: tuple[Path, Config, Space]) -> None:
    folder, config, space = searched
    state.begin(str(folder))
    run.check(config, space)
    assert state.can_resume(str(folder))


@pytest.mark.parametrize("note", [None, '{"format": 0}', '{"format": 2}', "damaged"])
def test_an_interrupted_search_of_another_format_is_refused(
    searched: tuple[Path, Config, Space], note: str | None
) -> None:
    folder, config, space = searched
    written_before_the_packages_were_renamed(folder)
    if note:
        (folder / "tune.json").write_text(note)
    with pytest.raises(UserError) as error:
        run.check(config, space)
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
    run.check(config, space)
    assert not state.can_resume(str(folder))


def test_a_search_that_ended_before_tune_wrote_anything_begins_anew(searched: tuple[Path, Config, Space]) -> None:
    folder, config, space = searched
    (folder / "tune" / "tuner.pkl").unlink()
    run.check(config, space)
    assert state.can_resume(str(folder))


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
