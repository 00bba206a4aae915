"""Ray Tune's schedulers as searches use them.

ASHA and the median rule measure time as the share of a trial's *own* steps, in percent: a trial that is longer or
shorter than the others (another batch, number of epochs or length of sequences) is compared with them at the same
share of its training, and none is over before it has done all its steps. Tune does not save a scheduler with a
search; here those two learn again from the trials' records what they knew when a search is resumed.
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
from olora_ray.sweep.spec import PROGRESS, WHOLE, SweepSpec, number_of, trial_place


def scheduler(sweep_spec: SweepSpec) -> TrialScheduler:
    """The scheduler that a search's space asks for."""
    space, settings = sweep_spec.space, sweep_spec.space.scheduler
    every = sweep_spec.train_spec.config.train.eval_every
    # A little less: a third of 100 times 3 is more than 100 in floats, and a rung would be missed.
    grace = min(WHOLE, WHOLE * (settings.grace or every) / sweep_spec.total()) * (1 - 1e-9)
    made: Halving | Median
    if settings.kind == "asha":
        length: dict[str, Any] = {"max_t": WHOLE, "grace_period": grace}  # Ray's annotations say int
        made = Halving(PROGRESS, reduction_factor=settings.reduction, **length)
    elif settings.kind == "median":
        made = Median(PROGRESS, grace_period=grace, min_samples_required=3)
    else:
        return Population(space, settings.interval or every) if settings.kind == "population" else FIFOScheduler()
    made.folder, made.measured = sweep_spec.folder, space.metric
    return made


class _Learning(TrialScheduler):
    """A scheduler that learns again, from the trials' records, what it knew before an interruption."""

    folder = measured = ""
    """The search's folder and metric."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tune has a trial: a new one, or one of before an interruption, whose results count again."""
        super().on_trial_add(tune_controller, trial)
        found = None
        with contextlib.suppress(OSError):  # Tune would begin the search anew; so it is compared with less
            found = record.read(trial_place(self.folder, number_of(str(trial))))
        if found is None or not found.total:
            return
        for step, value in found.curve:
            if step:
                self.note(tune_controller, trial, {PROGRESS: WHOLE * step / found.total, self.measured: value})

    def note(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        """Count a result of before."""
        raise NotImplementedError


class Halving(_Learning, ASHAScheduler):
    """Asynchronous successive halving over the share of a trial's own steps."""

    note = ASHAScheduler.on_trial_result


class Median(_Learning, MedianStoppingRule):
    """The median stopping rule over the share of a trial's own steps."""

    note = MedianStoppingRule.on_trial_complete  # on_trial_result would also judge


class Population(PopulationBasedTraining):
    """Population-based training whose members stay within the space, and that repeats.

    All members stop after the same steps; those that fall behind take over a better one's state, and a value of
    each field that is drawn anew or lies beside the better one's: the next of a list or of the steps of a quniform,
    0.8 or 1.2 times the number of a range. A field with `of` keeps a factor of its list, and follows its base.
    """

    def __init__(self, space: Space, interval: int) -> None:
        """`interval` in steps."""
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
        """Tune has a trial: a new one, or one of before an interruption, which may be over.

        Those that go on are compared where the furthest of them comes to its next evaluation. Ray would compare them at
        the first that any comes to, and then wait for one that is less far than all are by then.
        """
        super().on_trial_add(tune_controller, trial)
        if trial.is_finished():
            del self._trial_state[trial]
        elif step := (trial.last_result or {}).get("step"):
            every = self._perturbation_interval
            self._next_perturbation_sync = max(self._next_perturbation_sync, (step // every + 1) * every)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A member has come to an evaluation; with the last of them all are compared."""
        members: Any = _Members(tune_controller, self._trial_state)
        with _seeded(f"{self._seed} {result.get('step', 0)}"):
            return str(super().on_trial_result(members, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A member has failed."""
        self._leaves(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A member has come to its end."""
        self._leaves(tune_controller, trial)

    def _leaves(self, tune_controller: Any, trial: Any) -> None:
        """Wait for this member no longer; if all others have waited for it alone, they are compared now."""
        self._trial_state.pop(trial, None)
        left = _Members(tune_controller, self._trial_state).get_live_trials()
        if left and all(self._trial_state[each].last_train_time >= self._next_perturbation_sync for each in left):
            self.on_trial_result(tune_controller, left[0], self._trial_state[left[0]].last_result or {})


class _Members:
    """Tune's controller, whose trials are the members that are left.

    Ray 2.60, tune/schedulers/pbt.py: it waits for all trials that Tune calls live, and a failed one stays that.
    """

    def __init__(self, tune_controller: Any, members: Container[Any]) -> None:
        self._controller, self._members = tune_controller, members

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Any]:
        """In Tune's order."""
        return [trial for trial in self._controller.get_trials() if trial in self._members]

    def get_live_trials(self) -> list[Any]:
        """The same: who has left is no member."""
        return self.get_trials()


@contextlib.contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Tune chooses with the random numbers of the module: for the block they follow from the seed."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def _mutations(space: Space) -> dict[str, Any]:
    """Name of a draw -> the list that Tune moves in, or a function that draws from a range."""
    found: dict[str, Any] = {}
    for name, (field, domain) in zip(space.draw_names(), space.search.items(), strict=True):
        if domain.of is not None:
            found[name] = list(domain.factors())
        elif domain.quniform:
            found[name] = [domain.at(place) for place in range(domain.steps())]
        else:
            found[name] = list(domain.options()) or partial(_redrawn, field, domain)
    return found


def _redrawn(field: str, domain: Domain) -> Any:
    return domain.draw(field, Seeded((random.randrange(2**30),)))[field]


def _inside(space: Space, config: dict[str, Any]) -> dict[str, Any]:
    """Numbers that Tune has multiplied by 0.8 or 1.2, brought back into their ranges."""
    for field, domain in space.search.items():
        if (interval := domain.interval()) and not domain.quniform:
            config[field] = rounded(min(max(config[field], interval[0]), interval[1]), *interval)
    return config
