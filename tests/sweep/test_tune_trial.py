"""A process of Tune's becomes one trial after the other."""

import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.cluster.spec import TrainSpec
from olora_ray.model.source import BaseModel
from olora_ray.sweep import trial_file, tuner
from olora_ray.sweep.callback import SweepCallback
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import NUMBER, SweepSpec
from olora_ray.sweep.trial import Ended, Measured, TrialRun
from olora_ray.sweep.trial_file import read_all
from olora_ray.sweep.tune_trial import SearchTrial
from tests import tiny


def spec(folder: Path, **changes: Any) -> SweepSpec:
    config = tiny.config(run__storage=str(folder), train__steps=2)
    store: Any = tiny.store()
    search = {"train.lr": {"loguniform": [1e-4, 1e-2]}}
    space = Space.model_validate(
        {"search": search, "metric": "train/loss", "trials": 3, "include_default": False, **changes}
    )
    train_spec = TrainSpec(config, BaseModel("tiny", str(folder), "digest"), "digest", (0,), store, None)
    return SweepSpec("search", str(folder / "search"), train_spec, space, "", 0.0)


def test_the_next_trial_takes_over_with_a_record_of_its_own(tmp_path: Path) -> None:
    trial: Any = SearchTrial.__new__(SearchTrial)
    trial._trial_info = SimpleNamespace(trial_name="trial-000")
    trial.setup({NUMBER: 0, "train.lr": 1e-3}, sweep_spec=spec(tmp_path))
    trial.last = {"step": 2}
    first = trial.trial_run
    first._thread = threading.Thread(target=lambda: None)
    first._thread.start()
    trial._trial_info = SimpleNamespace(trial_name="trial-002")
    assert trial.reset_config({NUMBER: 2, "train.lr": 2e-3})
    assert trial.last == {}
    assert first._stop.asked, "its workers would train on"
    for run in (first, trial.trial_run):
        run._file.begin()
    found = read_all(str(tmp_path / "search"))
    assert {number: record.params["train.lr"] for number, record in found.items()} == {0: 1e-3, 2: 2e-3}
    assert trial.trial_run.config.train.lr == 2e-3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_the_end_of_a_trial_arrives_whatever_the_storage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its thread died at the write of its last record, and the search waited for ever."""
    run = TrialRun(spec(tmp_path), 1, {"train.lr": 1e-3})
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of a bug it says so

    def train() -> None:
        def write_text(*_: object) -> None:
            raise error

        monkeypatch.setattr(trial_file.storage, "write_text", write_text)
        run._on_row(2, {"train/loss": 0.5})

    monkeypatch.setattr(run, "_train", train)
    monkeypatch.setattr(run._items, "get", partial(run._items.get, timeout=60))
    first = run.next()
    found = [first] if isinstance(first, Ended) else [first, run.next()]
    passes = isinstance(error, OSError)
    ended = Ended("finished") if passes else Ended("failed", "RuntimeError: a bug")
    assert found == ([Measured(2, 0.5), ended] if passes else [ended])


@pytest.mark.parametrize(("kind", "reused"), [("none", True), ("asha", False), ("median", False)])
def test_processes_are_kept_where_trials_end_by_themselves(tmp_path: Path, kind: str, reused: bool) -> None:
    search = spec(tmp_path, scheduler={"kind": kind})
    made = tuner.build(search, SweepCallback(search.folder, search.space), 1)
    settings: Any = made._local_tuner._tune_config
    assert settings.reuse_actors is reused
