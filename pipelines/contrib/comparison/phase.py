"""A phase of a comparison: a search with a fixed list of trials, and the result of each trial."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comparison.arguments import Trial
from comparison.folder import FINAL, note_code, shared_by_adapter
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.load import override
from olora_ray.sweep import record as records
from olora_ray.sweep import run, search_folder
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.space import Domain, Draws, Scheduler, Space
from olora_ray.sweep.spec import SweepSpec

BROKE_OFF = "not finite"
"""Part of the reason if a training's loss or gradient became NaN or infinite: its learning rate was too large."""
UNTRAINED = "step 0:"
"""Start of the reason if the loss was not finite before training: then the base model or the rows are the cause."""
PLACE = "place"
"""Key of the only draw: the position in the list of trials."""


class FixedTrials(Space):
    """A search without a choice: every trial of a list, once and to its last step, in a folder of its own name."""

    of_trials: tuple[dict[str, Any], ...]
    """Dotted field -> value, for each trial."""
    names: tuple[str, ...]

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> "FixedTrials":
        return cls(
            search={
                "run.seed": Domain(choice=tuple(dict.fromkeys(trial.seed for trial in trials)))
            },
            set={},
            searcher="grid",
            scheduler=Scheduler(kind="none"),
            include_default=False,
            of_trials=tuple(dict(trial.values) for trial in trials),
            names=tuple(trial.name() for trial in trials),
        )

    def count(self) -> int:
        return len(self.of_trials)

    def own_name(self, number: int) -> str:
        return self.names[number]

    def drawn(self, number: int) -> dict[str, Any]:
        return {PLACE: number}

    def draw_names(self) -> list[str]:
        return [PLACE]

    def values(self, draws: Draws) -> dict[str, Any]:
        return dict(self.of_trials[draws[PLACE]]) if PLACE in draws else {}


@dataclass(frozen=True)
class PhaseSpec(SweepSpec):
    """A search whose trials share the base model; all trials of a seed have the same tokens."""

    root: str = ""
    """The comparison's folder; `folder` is the phase's."""
    specs: Mapping[int, TrainSpec] = field(default_factory=dict)
    """run.seed -> specification with the tokens in this seed's order."""
    evaluations: int = 1
    """Evaluations of a training, evenly over its steps."""

    def config(self, number: int, draws: Mapping[str, Any]) -> DecidedConfig:
        config = super().config(number, draws)
        steps = self.steps(config, self.specs[config.run.seed].train)
        return override(config, {"train.eval_every": max(1, steps // self.evaluations)})

    def spec_of(self, config: DecidedConfig) -> TrainSpec:
        # In the final phase each trial computes its factors itself, as a run would: they depend on the seed.
        final, seed = self.folder == storage.join(self.root, FINAL), config.run.seed
        shared = (
            storage.join(self.root, "shared", f"seed-{seed}")
            if final
            else shared_by_adapter(self.root, config)
        )
        return replace(self.specs[seed], config=config, shared=shared)

    def shares_data(self) -> bool:
        return True


@dataclass(frozen=True)
class Ended:
    trial: Trial
    record: TrialRecord
    spec: TrainSpec
    loss: float
    """Held-out loss of the adapter after the last step; infinite if the training broke off."""


def base_loss(trials: Sequence[Ended]) -> float:
    """Return the held-out loss before the first step, which is the base model's; infinite if no trial measured it."""
    return next(
        (value for each in trials for step, value in each.record.curve[:1] if step == 0), math.inf
    )


def ended(spec: PhaseSpec, trials: Sequence[Trial]) -> list[Ended]:
    """Run those of the trials that have not ended, and return all of them in their order.

    Raises UserError if a trial failed for another reason than its learning rate. The next call runs it again.
    """
    if left := missing(spec.folder, trials):
        note_code(spec.root)
        # Only the missing trials are searched, so Ray Tune must forget the list of an earlier attempt. The trials
        # resume from their own folders.
        storage.remove(search_folder.tune_place(spec.folder))
        search_folder.keep(
            spec.folder, search_folder.Progress(search_folder.progress(spec.folder).seconds)
        )
        run.search(replace(spec, space=FixedTrials.of(left)))
    found, every = _records(spec.folder, trials), replace(spec, space=FixedTrials.of(trials))
    results = list[Ended]()
    for number, (trial, record) in enumerate(zip(trials, found, strict=True)):
        if record is None or not _has_ended(record):
            raise UserError(
                f"{spec.folder}: {trial.name()} failed: {(record.reason or record.status) if record else 'no record'};"
                " remove the cause and run the same command again: it keeps the trials that have ended"
            )
        config = every.config(number, every.space.drawn(number))
        results.append(Ended(trial, record, every.spec_of(config), loss_of(record)))
    return results


def missing(folder: str, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have no result in a phase's folder."""
    found = zip(trials, _records(folder, trials), strict=True)
    return [trial for trial, record in found if record is None or not _has_ended(record)]


def loss_of(record: TrialRecord) -> float:
    """Return the loss after the last step; infinite for a training that broke off."""
    step, last = record.curve[-1] if record.curve else (0, math.inf)
    return (
        last
        if record.status == "finished" and step == record.total and math.isfinite(last)
        else math.inf
    )


def _place(folder: str, trial: Trial) -> str:
    return storage.join(folder, "trials", trial.name())


def _records(folder: str, trials: Sequence[Trial]) -> list[TrialRecord | None]:
    with as_user_error(
        f"{folder}: cannot read the records of the trials", OSError, reason=short_reason
    ):
        return [records.read_record(_place(folder, trial)) for trial in trials]


def _has_ended(record: TrialRecord) -> bool:
    # A training that broke off is a result: its learning rate is too large. Any other failure has a cause to remove.
    broke_off = BROKE_OFF in record.reason and not record.reason.startswith(UNTRAINED)
    return record.status == "finished" or (record.status == "failed" and broke_off)
