"""Decisions of Ray Tune's own schedulers for the trials of a search, without a cluster."""

import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from olora_ray.config.load import override
from olora_ray.sweep.record import TrialFile, TrialRecord
from olora_ray.sweep.schedulers import Halving, Median, Population, scheduler
from olora_ray.sweep.space import Space
from olora_ray.sweep.spec import NUMBER, PAIRED, PROGRESS, WHOLE, SweepSpec, trial_name, trial_path
from tests import tiny

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
RANGES: dict[str, dict[str, Any]] = {
    "train.schedule": {"choice": ["cosine", "linear", "constant"]},
    "train.clip": {"choice": [None, 0.5, 1.0]},
    "train.warmup": {"grid": [0.0, 0.1]},
    "train.micro_batch": {"quniform": [1, 16, 4]},
    "train.lr": {"loguniform": [1e-5, 1e-2]},
    "train.weight_decay": {"uniform": [0.0, 0.2]},
    "train.lr_ratio": {"of": "train.micro_batch", "times": [1, 2.0]},
}
"""One field per type of range."""


class Controller:
    """The part of Tune's controller that schedulers use."""

    search_alg = None

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status != Trial.TERMINATED]

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        trial.set_status(Trial.PAUSED)

    def _schedule_trial_save(self, trial: Trial, result: Mapping[str, Any]) -> str:
        return f"checkpoint of {trial}"


def tune_trial(number: int, draws: Mapping[str, Any] | None = None) -> Trial:
    return Trial(
        "stub", stub=True, config={NUMBER: number, **(draws or {})}, trial_name_creator=lambda _: trial_name(number)
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


def asha(folder: Path, total: int, kind: str = "asha", **settings: Any) -> Any:
    """Return the scheduler of a search whose config has `total` steps and evaluates after each sixth of them."""
    config = override(tiny.config(), {"train.steps": total, "train.eval_every": max(1, total // 6)})
    found = space({"train.steps": {"choice": [60, 120, 240]}}, scheduler={"kind": kind, **settings})
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


def test_trials_of_any_length_are_compared_at_the_same_share_of_it(tmp_path: Path) -> None:
    made, controller = asha(tmp_path, 120, grace=30, reduction=2), Controller([])
    for number, (total, value) in enumerate([(120, 1.0), (60, 1.1), (240, 0.9)]):
        trial = tune_trial(number)
        made.on_trial_add(controller, trial)
        before, quarter = result(total // 4 - 1, total, 9.0), result(total // 4, total, value)
        assert made.on_trial_result(controller, trial, before) == CONTINUE  # no rung yet, however bad
        assert made.on_trial_result(controller, trial, quarter) == (STOP if value > 1 else CONTINUE)


@pytest.mark.parametrize(
    ("total", "every", "reduction"), [(36, 4, 3.0), (12, 3, 2.0), (120, 20, 3.0), (7, 1, 1.5), (7, 1, 3.0)]
)
def test_equal_lengths_have_the_rungs_that_steps_have(tmp_path: Path, total: int, every: int, reduction: float) -> None:
    made, controller = asha(tmp_path, total, grace=every, reduction=reduction), Controller([])
    good, bad = tune_trial(0), tune_trial(1)
    for trial in (good, bad):
        made.on_trial_add(controller, trial)
    rungs = [every * reduction**k for k in range(20) if every * reduction**k <= total]
    for step in range(every, total, every):
        made.on_trial_result(controller, good, result(step, total, 1.0))
        passed = [rung for rung in rungs if step - every < rung <= step]
        decision = made.on_trial_result(controller, bad, result(step, total, 2.0))
        assert decision == (STOP if passed else CONTINUE), step


def test_the_median_is_that_of_trials_that_are_as_far(tmp_path: Path) -> None:
    """Counted in steps, a trial of 60 would never be compared with slower ones of 240."""
    made, controller = asha(tmp_path, 240, kind="median"), Controller([])
    assert isinstance(made, Median)
    for number in range(3):
        trial = tune_trial(number)
        made.on_trial_add(controller, trial)
        for step in range(40, 241, 40):
            assert made.on_trial_result(controller, trial, result(step, 240, 1.0)) == CONTINUE
    short = tune_trial(3)
    made.on_trial_add(controller, short)
    assert made.on_trial_result(controller, short, result(30, 60, 2.0)) == STOP


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_resumed_search_compares_with_what_was_measured_before(tmp_path: Path, kind: str) -> None:
    """Tune does not save schedulers: without the records, the first trial after a restart had no rival."""
    for number in range(4):
        kept = TrialFile(trial_path(str(tmp_path), number), TrialRecord(number, {}, "unfinished", total=60), "min")
        for step in (0, 10, 20, 30, 40):
            kept.measured(step, 1.0)
    made, controller = asha(tmp_path, 60, kind=kind), Controller([])
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

    decisions = [after(10, number, loss) for number, loss in enumerate((2.0, 1.0, 1.5, 0.9, 3.0, 0.8))]
    assert decisions == [CONTINUE, CONTINUE, STOP, CONTINUE, STOP, CONTINUE]
    assert after(9, 2, 0.1) == CONTINUE  # no rung
    assert [after(40, number, loss) for number, loss in ((3, 0.5), (0, 7.0), (5, 3.0))] == [CONTINUE, CONTINUE, STOP]


def test_a_resumed_search_compares_training_losses_of_before(tmp_path: Path) -> None:
    for number in range(1, 5):
        kept = TrialFile(trial_path(str(tmp_path), number), TrialRecord(number, {}, "unfinished", total=160), "min")
        kept.compared(10, 1.0)
        kept.measured(20, 0.1)
    made, controller = on_the_same_rows(tmp_path), Controller([])
    trials = [tune_trial(number) for number in range(1, 6)]
    for trial in trials:
        made.on_trial_add(controller, trial)
    assert made.on_trial_result(controller, trials[-1], {**result(10, 160, 9.0), PAIRED: 1.1}) == STOP


@pytest.mark.parametrize(
    "settings",
    [
        {"search": {"train.steps": {"choice": [60, 120]}}},
        {"search": {"train.global_batch": {"choice": [4, 8]}}},
        {"search": {"data.max_length": {"choice": [64, 128]}}},
        {"search": {"adapter.dropout": {"choice": [0.0, 0.1]}}},
        {"search": {"train.lr": {"choice": [1e-3]}}, "metric": "score/exact", "mode": "max"},
        {"search": {"train.lr": {"choice": [1e-3]}}, "scheduler": {"kind": "median"}},
    ],
)
def test_others_are_compared_by_evaluations(settings: dict[str, Any]) -> None:
    assert not Space.model_validate(settings).paired()


def evolved(found: Space, rounds: int, interference: int = 0) -> list[list[dict[str, Any]]]:
    """Return the draws of all members after each round of a population whose later members are better."""
    trials = [tune_trial(number, found.drawn(number)) for number in range(found.count())]
    controller, made = Controller(trials), Population(found, 5)
    assert made.set_search_properties(found.metric, "min")
    for trial in trials:
        made.on_trial_add(controller, trial)
    seen = [[_draws(trial) for trial in trials]]
    for turn in range(1, rounds + 1):
        for number, trial in enumerate(trials):
            for _ in range(interference):
                random.random()
            trial.set_status(Trial.RUNNING)
            made.on_trial_result(controller, trial, result(5 * turn, 5 * rounds, 9.0 - (number + turn) % len(trials)))
            trial.set_status(Trial.PAUSED)
            trial.run_metadata.checkpoint_manager._latest_checkpoint_result = SimpleNamespace(
                checkpoint=SimpleNamespace(path=f"{turn}-{number}"), metrics={}
            )
        seen.append([_draws(trial) for trial in trials])
    return seen


def _draws(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.config.items() if name != NUMBER}


def inside(found: Space, draws: Mapping[str, Any]) -> None:
    """True if the space contains each value, with the same type."""
    assert list(draws) == found.draw_names()
    for field, domain in found.search.items():
        if domain.of is not None:
            assert draws[f"{field}:times"] in domain.factors()
            assert found.values(draws)[field] == found.values(draws)[domain.of] * draws[f"{field}:times"]
            continue
        value = draws[field]
        if listed := domain.options():
            assert any(value is option or (type(value), value) == (type(option), option) for option in listed)
        elif domain.quniform:
            steps = [domain.at(place) for place in range(domain.steps())]
            assert any((type(value), value) == (type(step), step) for step in steps)
        else:
            low, high = domain.extremes()
            assert isinstance(value, float)
            assert low <= value <= high


def test_values_of_a_population_are_valid_in_a_config() -> None:
    found = space(RANGES, scheduler={"kind": "population"}, trials=8, seed=5)
    for members in evolved(found, 10):
        for draws in members:
            inside(found, draws)
            override(tiny.config(), found.values(draws))


def test_a_population_repeats_whatever_else_draws_random_numbers() -> None:
    found = space(RANGES, scheduler={"kind": "population"}, trials=8, seed=5)
    state = random.getstate()
    first = evolved(found, 6)
    assert random.getstate() == state
    assert first == evolved(found, 6, interference=3)
    assert first != evolved(found.model_copy(update={"seed": 6}), 6)


def test_a_population_explores_each_kind_of_range() -> None:
    listed, factors = [f"value {i}" for i in range(40)], [1 + i / 8 for i in range(40)]
    search = {
        "train.a": {"choice": listed},
        "train.b": {"grid": listed},
        "train.c": {"quniform": [1, 99, 1]},
        "train.d": {"uniform": [0, 1]},
        "train.e": {"loguniform": [1e-5, 1]},
        "train.f": {"of": "train.d", "times": factors},
    }
    found = space(search, scheduler={"kind": "population"}, trials=12, seed=1)
    rounds = evolved(found, 30)
    for name in found.draw_names():
        # A member that only takes over others has the start values of one of them.
        assert {draws[name] for draws in rounds[-1]} - {draws[name] for draws in rounds[0]}, name


def population(members: int) -> tuple[Any, Controller, list[Trial]]:
    """Return a scheduler that compares after each fourth step, and its members."""
    found = space({"train.lr": {"loguniform": [1e-4, 1e-2]}}, scheduler={"kind": "population"}, trials=members)
    trials = [tune_trial(number, found.drawn(number)) for number in range(members)]
    controller, made = Controller(trials), Population(found, 4)
    assert made.set_search_properties("eval/loss", "min")
    return made, controller, trials


def comes_to(made: Any, controller: Controller, trial: Trial, step: int, value: float = 1.0) -> None:
    """Let a member report an evaluation and pause with a checkpoint, as Tune does."""
    trial.set_status(Trial.RUNNING)
    decided = made.on_trial_result(controller, trial, result(step, 20, value))
    assert decided in (TrialScheduler.PAUSE, TrialScheduler.NOOP)  # NOOP: it takes over another member, and is paused
    trial.set_status(Trial.PAUSED)
    trial.run_metadata.checkpoint_manager._latest_checkpoint_result = SimpleNamespace(
        checkpoint=f"checkpoint of {trial}", metrics={}
    )


def ends(made: Any, controller: Controller, trial: Trial, fails: bool) -> None:
    """Tell the scheduler before the trial has its new state, as Tune does."""
    trial.set_status(Trial.RUNNING)
    if fails:
        made.on_trial_error(controller, trial)
    else:
        made.on_trial_complete(controller, trial, {})
    trial.set_status(Trial.ERROR if fails else Trial.TERMINATED)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_population_does_not_wait_for_a_member_that_has_left(last: bool, fails: bool) -> None:
    """Regression: all others waited for ever, because a failed trial stays live for Tune."""
    made, controller, trials = population(4)
    for trial in trials:
        made.on_trial_add(controller, trial)
    before = trials[2].config["train.lr"]
    if not last:
        ends(made, controller, trials[3], fails)
    for number, trial in enumerate(trials[:3]):
        comes_to(made, controller, trial, 4, float(number))
    if last:
        assert made.choose_trial_to_run(controller) is trials[3]
        ends(made, controller, trials[3], fails)
    assert trials[2].config["train.lr"] != before, "the worst of those that are left takes over the best"
    for step in (8, 12):
        for _ in range(3):
            chosen = made.choose_trial_to_run(controller)
            assert chosen in trials[:3]
            comes_to(made, controller, chosen, step)
    assert made.choose_trial_to_run(controller) in trials[:3]


@pytest.mark.parametrize("steps", [(4, 4, 4), (8, 8, 8), (8, 4, 8)])
def test_a_population_that_is_resumed_goes_on_after_its_next_comparison(steps: tuple[int, ...]) -> None:
    """Regression: Tune forgets its schedulers, so after the first comparison all members waited for ever."""
    made, controller, trials = population(3)
    for trial, step in zip(trials, steps, strict=True):
        trial.run_metadata.last_result = result(step, 20, 1.0)
        made.on_trial_add(controller, trial)
    reached = list(steps)
    while min(reached) < 16:
        chosen = made.choose_trial_to_run(controller)
        assert chosen is not None, reached
        place = trials.index(chosen)
        reached[place] += 4
        comes_to(made, controller, chosen, reached[place])
    assert reached == [16, 16, 16]
    assert made.choose_trial_to_run(controller) is not None
