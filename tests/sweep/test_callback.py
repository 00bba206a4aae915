"""Log lines and counts of the driver while Tune runs the trials."""

from pathlib import Path
from typing import Any

from olora_ray.sweep import search_folder
from olora_ray.sweep.record import TrialFile, TrialRecord
from olora_ray.sweep.search_folder import Progress
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import ENDED, NUMBER, trial_name, trial_path
from olora_ray.sweep.tuner import SweepCallback
from tests.refused import refused
from tests.said import said

NAN = float("nan")


class Trial:
    """The attributes of Tune's trial that the callback reads."""

    def __init__(self, number: int, **result: Any) -> None:
        self.trial_id, self.config = f"id{number}", {NUMBER: number, "train.lr": 1e-3}
        self.last_result = {"step": 8, "total": 8, ENDED: True, **result}
        self.number, self.status = number, "RUNNING"

    def is_finished(self) -> bool:
        return self.status in ("ERROR", "TERMINATED")

    def __str__(self) -> str:
        return trial_name(self.number)


def search(folder: Path, **tree: Any) -> SweepCallback:
    return SweepCallback(
        str(folder), Space.model_validate({"search": {"train.lr": {"choice": [1e-3]}}, **tree})
    )


def ends(watch: SweepCallback, number: int, *values: float) -> None:
    """Let a trial measure these values in turn, and finish."""
    kept = TrialFile(
        trial_path(watch.folder, number),
        TrialRecord(number, {}, "unfinished"),
        watch.space.better(),
    )
    for place, value in enumerate(values, 1):
        kept.measured(4 * place, value)
    kept.ended("finished")
    watch.on_trial_complete(0, [], Trial(number, **{watch.space.metric: values[-1]}))


def test_a_first_value_of_nan_does_not_hide_what_comes_after(tmp_path: Path) -> None:
    """Regression: NaN stayed the best value, and patience ended the search although trials were better."""
    watch = search(tmp_path, metric="score/f1", mode="max", scheduler={"kind": "none"}, patience=3)
    for number, value in enumerate([NAN, 0.1, 0.2, 0.3, 0.4]):
        ends(watch, number, value)
        assert not watch.stop_all()
    assert watch.best == (0.4, 4)


def test_trials_that_bring_nothing_better_end_the_search(tmp_path: Path) -> None:
    watch = search(tmp_path, patience=3)
    for number, value in enumerate([0.5, NAN, 0.6, float("inf")]):
        assert not watch.stop_all()
        ends(watch, number, value)
    with said() as lines:
        assert watch.stop_all()
        assert watch.stop_all()
    assert lines == ["the search ends: 3 trials in a row had no better value"]


def test_the_seconds_and_the_time_budget_are_those_of_all_attempts(tmp_path: Path) -> None:
    search_folder.keep(str(tmp_path), Progress(40.0))  # an earlier attempt that was killed
    watch = search(tmp_path, time_budget=60)
    watch.on_trial_start(0, [], Trial(0))
    assert not watch.stop_all()
    assert 40 <= search_folder.progress(str(tmp_path)).seconds < 59
    search_folder.keep(str(tmp_path), Progress(60.0))
    second = search(tmp_path, time_budget=60)
    assert second.stop_all()
    assert second.over == "the time budget of 60 s is used up"
    assert search_folder.progress(str(tmp_path)).seconds >= 60, (
        "the next attempt would not know that it is used up"
    )
    second.on_trial_complete(0, [], Trial(3, step=4, **{ENDED: False}))
    assert second.cut == {3}


def test_what_a_limit_has_cut_is_known(tmp_path: Path) -> None:
    """Regression: Tune stops these trials without calling a callback, and the report blamed the scheduler."""
    watch = search(tmp_path, patience=3)
    trials = [Trial(number) for number in range(5)]
    watch.on_step_begin(0, trials)
    for trial, status in zip(
        trials, ["TERMINATED", "RUNNING", "ERROR", "PAUSED", "PENDING"], strict=True
    ):
        trial.status = status
    assert not watch.stop_all()
    assert watch.cut == set()
    watch.since_better = 3
    assert watch.stop_all()
    for trial in trials:
        trial.status = "TERMINATED"
    assert watch.stop_all()
    assert watch.cut == {1, 3, 4}


def test_a_search_that_tune_begins_anew_with_too_few_trials_is_no_success(tmp_path: Path) -> None:
    """Regression: Tune only logs a state that it cannot read. It ran one trial, and the search counted as complete."""
    watch = search(tmp_path, searcher="tpe")
    watch.setup(stop=watch, num_samples=1, total_num_samples=16)
    with refused("Ray Tune cannot resume the search in"):
        watch.setup(stop=watch, num_samples=1, total_num_samples=1)
