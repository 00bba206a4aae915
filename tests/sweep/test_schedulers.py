"""Decisions of Ray Tune's own schedulers for the trials of a search, without a cluster."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from olora_ray.config.load import override
from olora_ray.sweep.record import TrialFile, TrialRecord
from olora_ray.sweep.schedulers import Halving, scheduler
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import NUMBER, PAIRED, PROGRESS, WHOLE, SweepSpec, trial_name, trial_path
from tests import tiny

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


class Controller:
    """The part of Tune's controller that schedulers use."""

    search_alg = None

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials

    def get_trials(self) -> list[Trial]:
        return self.trials


def tune_trial(number: int) -> Trial:
    return Trial(
        "stub", stub=True, config={NUMBER: number}, trial_name_creator=lambda _: trial_name(number)
    )


def result(step: int, total: int, value: float) -> dict[str, Any]:
    """Return the report of a trial with this many steps."""
    return {"step": step, "total": total, PROGRESS: WHOLE * step / total, "eval/loss": value}


def space(search: Mapping[str, Any], **tree: Any) -> Space:
    return Space.model_validate({"search": search, **tree})


def planned(folder: Path, config: Any, found: Space) -> Any:
    """Return the scheduler of a search in this space."""

    class Planned(SweepSpec):
        def total(self) -> int:
            return int(config.train.steps)

    given: Any = SimpleNamespace(config=config)
    return scheduler(Planned("search", str(folder), given, found, "", 0.0))


def asha(folder: Path, total: int, **settings: Any) -> Any:
    """Return the scheduler of a search whose config has `total` steps and evaluates after each sixth of them."""
    config = override(tiny.config(), {"train.steps": total, "train.eval_every": max(1, total // 6)})
    found = space({"train.steps": {"choice": [60, 120, 240]}}, scheduler=settings)
    made = planned(folder, config, found)
    assert made.set_search_properties("eval/loss", "min")
    return made


def test_a_longer_trial_that_is_the_best_is_not_cut_as_if_it_were_finished(tmp_path: Path) -> None:
    """Regression: it was stopped at step 150 of its 240, where a trial of the config's length ends."""
    made, controller = asha(tmp_path, 120), Controller([])
    assert isinstance(made, Halving)
    trials = [tune_trial(number) for number in range(3)]
    for trial in trials:
        made.on_trial_add(controller, trial)
    for trial, total, better in zip(trials, (60, 120, 240), (0.0, 0.1, 0.5), strict=True):
        decisions = [
            made.on_trial_result(controller, trial, result(step, total, 2 - better - step / total))
            for step in range(total // 12, total, total // 12)
        ]
        assert set(decisions) == {CONTINUE}


def test_a_resumed_search_compares_with_what_was_measured_before(tmp_path: Path) -> None:
    """Tune does not save schedulers: without the records, the first trial after a restart had no rival."""
    for number in range(4):
        kept = TrialFile(
            trial_path(str(tmp_path), number),
            TrialRecord(number, {}, "unfinished", total=60),
            "min",
        )
        for step in (0, 10, 20, 30, 40):
            kept.measured(step, 1.0)
    made, controller = asha(tmp_path, 60), Controller([])
    for number in range(4):
        made.on_trial_add(controller, tune_trial(number))
    new = tune_trial(4)
    made.on_trial_add(controller, new)
    assert made.on_trial_result(controller, new, result(20, 60, 3.0)) == STOP


def on_the_same_rows(folder: Path, **settings: Any) -> Any:
    """Return the scheduler of a search of 160 steps that varies only the learning rate."""
    found = space({"train.lr": {"loguniform": [1e-4, 1e-2]}}, **settings)
    made = planned(folder, override(tiny.config(), {"train.steps": 160}), found)
    assert made.set_search_properties("eval/loss", "min")
    return made


def test_trials_on_the_same_rows_are_compared_by_their_training_losses(tmp_path: Path) -> None:
    """One of four continues; evaluations stop nobody, and the unchanged config is always measured to its end."""
    made, controller = on_the_same_rows(tmp_path), Controller([])
    trials = [tune_trial(number) for number in range(6)]
    for trial in trials:
        made.on_trial_add(controller, trial)

    def after(step: int, number: int, loss: float) -> str:
        evaluated = result(step, 160, 9.0)
        assert made.on_trial_result(controller, trials[number], evaluated) == CONTINUE
        return str(made.on_trial_result(controller, trials[number], {**evaluated, PAIRED: loss}))

    decisions = [
        after(10, number, loss) for number, loss in enumerate((2.0, 1.0, 1.5, 0.9, 3.0, 0.8))
    ]
    assert decisions == [CONTINUE, CONTINUE, STOP, CONTINUE, STOP, CONTINUE]
    assert after(9, 2, 0.1) == CONTINUE  # no rung
    assert [after(40, number, loss) for number, loss in ((3, 0.5), (0, 7.0), (5, 3.0))] == [
        CONTINUE,
        CONTINUE,
        STOP,
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"search": {"train.steps": {"choice": [60, 120]}}},
        {"search": {"adapter.dropout": {"choice": [0.0, 0.1]}}},
        {"search": {"train.lr": {"choice": [1e-3]}}, "metric": "score/exact", "mode": "max"},
    ],
)
def test_others_are_compared_by_evaluations(settings: dict[str, Any]) -> None:
    assert not Space.model_validate(settings).paired()
