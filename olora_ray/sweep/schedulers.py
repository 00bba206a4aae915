"""Ray Tune's schedulers, adapted to searches.

ASHA and the median rule measure time as the share of a trial's *own* steps, in percent. So a trial with more or fewer
steps than the others (another batch, number of epochs or length of sequences) is compared with them at the same share
of its training, and no trial ends before all its steps. Tune does not save a scheduler with a search: when a search is
resumed, these two learn from the trials' records again.

Where all trials see the same rows in the same steps, ASHA compares their training losses: of the same rows, so that
differences of a few steps say much (docs/generated/benchmarks.md#searches), and without an evaluation.
"""

import contextlib
import random
from collections.abc import Container, Iterator
from functools import partial
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from olora_ray.sweep import record
from olora_ray.sweep.space import Domain, Seeded, Space, rounded
from olora_ray.sweep.spec import PAIRED, PROGRESS, WHOLE, SweepSpec, number_of, trial_path


def scheduler(sweep_spec: SweepSpec) -> TrialScheduler:
    space, settings = sweep_spec.space, sweep_spec.space.scheduler
    every = sweep_spec.train_spec.config.train.eval_every
    # Slightly less, because of rounding: a third of 100, times 3, exceeds 100 in floats, and a trial would miss a rung.
    grace = min(WHOLE, WHOLE * sweep_spec.grace() / sweep_spec.total()) * (1 - 1e-9)
    tuned: Halving | Median
    if settings.kind == "asha":
        length: dict[str, Any] = {"max_t": WHOLE, "grace_period": grace}  # Ray's annotations say int
        tuned = (Paired if space.paired() else Halving)(PROGRESS, reduction_factor=settings.reduction, **length)
    elif settings.kind == "median":
        tuned = Median(PROGRESS, grace_period=grace, min_samples_required=3)
    else:
        return Population(space, settings.interval or every) if settings.kind == "population" else FIFOScheduler()
    tuned.folder, tuned.measured = sweep_spec.folder, PAIRED if space.paired() else space.metric
    return tuned


class _Learning(TrialScheduler):
    """A scheduler that learns from the trials' records again when a search is resumed."""

    folder = measured = ""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        # The trial is new, or it ran before an interruption: then its earlier results count again.
        kept = None
        with contextlib.suppress(OSError):  # raising would make Tune start the whole search again
            kept = record.read(trial_path(self.folder, number_of(str(trial))))
        if kept is None or not kept.total:
            return
        for step, value in kept.compared if self.measured == PAIRED else kept.curve:
            if step:
                self.note(tune_controller, trial, {PROGRESS: WHOLE * step / kept.total, self.measured: value})

    def note(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        raise NotImplementedError


class Halving(_Learning, ASHAScheduler):
    """Asynchronous successive halving over the share of a trial's own steps."""

    note = ASHAScheduler.on_trial_result


class Paired(Halving):
    """The same over training losses of the same rows. For Tune its metric is that of the search."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if PAIRED not in result:
            return TrialScheduler.CONTINUE
        compared = {PROGRESS: result[PROGRESS], self.metric: result[PAIRED]}
        decision = super().on_trial_result(tune_controller, trial, compared)
        # Trial 0 is the unchanged config, which the report compares with the best trial, at the same number of steps.
        return TrialScheduler.CONTINUE if number_of(str(trial)) == 0 else str(decision)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The last value of the metric is no training loss."""

    note = on_trial_result


class Median(_Learning, MedianStoppingRule):
    """The median stopping rule over the share of a trial's own steps."""

    note = MedianStoppingRule.on_trial_complete  # on_trial_result would also judge


class Population(PopulationBasedTraining):
    """Population-based training whose members stay within the space, and whose result is repeatable.

    All members stop after the same steps. A member that falls behind takes over the state of a better one, and a new
    value for each field: a new draw, or next to the better one's value. Next means the neighbour in a list or in the
    steps of a quniform, or 0.8 or 1.2 times the number of a range. A field with `of` keeps a factor of its list, and
    follows its base.
    """

    def __init__(self, space: Space, interval: int) -> None:
        super().__init__(
            "step",
            perturbation_interval=interval,
            hyperparam_mutations=_mutations(space),
            custom_explore_fn=partial(_inside, space),
            synch=True,  # otherwise a member could take over a checkpoint that its owner has just deleted
            log_config=False,
        )
        self._seed = space.seed

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        # A search is resumed, perhaps with members that are over. All members are compared at the next evaluation of
        # the furthest one. Ray would take the next evaluation of whichever member reports first, and then wait for
        # evaluations that the others have already passed.
        if trial.is_finished():
            del self._trial_state[trial]
        elif step := (trial.last_result or {}).get("step"):
            every = self._perturbation_interval
            self._next_perturbation_sync = max(self._next_perturbation_sync, (step // every + 1) * every)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        members: Any = _Members(tune_controller, self._trial_state)
        with _seeded(f"{self._seed} {result.get('step', 0)}"):
            return str(super().on_trial_result(members, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._leaves(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._leaves(tune_controller, trial)

    def _leaves(self, tune_controller: Any, trial: Any) -> None:
        # The others no longer wait for this member. If they waited for it alone, they are compared now.
        self._trial_state.pop(trial, None)
        left = _Members(tune_controller, self._trial_state).get_live_trials()
        if left and all(self._trial_state[each].last_train_time >= self._next_perturbation_sync for each in left):
            self.on_trial_result(tune_controller, left[0], self._trial_state[left[0]].last_result or {})


class _Members:
    """Tune's controller, reduced to the trials that are still members.

    Ray 2.60, tune/schedulers/pbt.py waits for all trials that Tune calls live, and a failed trial stays live.
    """

    def __init__(self, tune_controller: Any, members: Container[Any]) -> None:
        self._controller, self._members = tune_controller, members

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Any]:
        return [trial for trial in self._controller.get_trials() if trial in self._members]

    def get_live_trials(self) -> list[Any]:
        return self.get_trials()


@contextlib.contextmanager
def _seeded(seed: str) -> Iterator[None]:
    # Tune draws from Python's global generator. Seeding it for the block makes a search repeatable.
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def _mutations(space: Space) -> dict[str, Any]:
    """Return name of a draw -> the list in which Tune moves to a neighbour, or a function that draws from a range."""
    mutations: dict[str, Any] = {}
    for name, (field, domain) in zip(space.draw_names(), space.search.items(), strict=True):
        if domain.of is not None:
            mutations[name] = list(domain.factors())
        elif domain.quniform:
            mutations[name] = [domain.at(position) for position in range(domain.steps())]
        else:
            mutations[name] = list(domain.options()) or partial(_redrawn, field, domain)
    return mutations


def _redrawn(field: str, domain: Domain) -> Any:
    return domain.draw(field, Seeded((random.randrange(2**30),)))[field]


def _inside(space: Space, config: dict[str, Any]) -> dict[str, Any]:
    """Return Tune's config, with the numbers that Tune multiplied by 0.8 or 1.2 moved back into their ranges."""
    for field, domain in space.search.items():
        if (interval := domain.interval()) and not domain.quniform:
            config[field] = rounded(min(max(config[field], interval[0]), interval[1]), *interval)
    return config
