"""A phase of a comparison: a search whose trials are fixed beforehand, and what each of them came to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comparison.folder import FINAL, noted, shared_place
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.sweep import record as records
from olora_ray.sweep import run, search_folder
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.space import Chooser, Domain, Draws, Scheduler, Space
from olora_ray.sweep.spec import SweepSpec, trial_name

BROKE_OFF = "not finite"
"""In the reason of a training whose loss or gradient became no number: the learning rate was too large for it."""
UNTRAINED = "step 0:"
"""Begins the reason if the loss was none before training: that is the base's, or the rows'."""
PLACE = "place"
"""The only draw: the place in the list."""


class FixedTrials(Space):
    """A search without a choice: every trial of a list once, each to its end."""

    of_trials: tuple[dict[str, Any], ...]
    """Dotted field -> value of each trial."""

    @classmethod
    def of(cls, trials: Sequence[Mapping[str, Any]]) -> "FixedTrials":
        """The space of these trials, which all name the same fields."""
        values = {field: list(dict.fromkeys(trial[field] for trial in trials)) for field in trials[0]}
        return cls(
            search={field: Domain(choice=tuple(found)) for field, found in values.items()},
            set={},
            searcher="grid",
            scheduler=Scheduler(kind="none"),
            include_default=False,
            of_trials=tuple(dict(trial) for trial in trials),
        )

    def count(self) -> int:
        """Number of trials."""
        return len(self.of_trials)

    def cells(self) -> int:
        """The same: what is crossed is not the values of the fields."""
        return len(self.of_trials)

    def drawn(self, number: int) -> dict[str, Any]:
        """The place of a trial."""
        return {PLACE: number}

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        """Nothing is drawn."""
        raise NotImplementedError("the trials are fixed")

    def draw_names(self) -> list[str]:
        """The key of the draws."""
        return [PLACE]

    def values(self, draws: Draws) -> dict[str, Any]:
        """Field -> value at a place."""
        return dict(self.of_trials[draws[PLACE]]) if PLACE in draws else {}

    def as_draws(self, config: Config) -> None:
        """None: it makes no difference here if one of them is the config as it is."""


@dataclass(frozen=True)
class PhaseSpec(SweepSpec):
    """Specification of a phase, which travels to every trial; the trials have tokens by their seed."""

    root: str = ""
    """Folder of the comparison; `folder` is that of the phase."""
    specs: Mapping[int, TrainSpec] = field(default_factory=dict)
    """run.seed -> specification with the tokens in the order of that seed."""

    def spec_of(self, config: Config) -> TrainSpec:
        """The specification of a trial.

        In the final phase a trial makes its factors itself, as a run would: they depend on the seed.
        """
        seed = config.run.seed
        name = config.adapter.method if self.folder != storage.join(self.root, FINAL) else f"seed-{seed}"
        return replace(self.specs[seed], config=config, shared=shared_place(self.root, name))

    def shares_data(self) -> bool:
        """The base model is the same for all, and so are the tokens of a seed."""
        return True


@dataclass(frozen=True)
class Ended:
    """A trial of a phase at its end."""

    record: TrialRecord
    loss: float
    """Held-out loss after the last step, of the adapter as it is then; infinite if the training broke off."""

    def base(self) -> float | None:
        """The held-out loss before the first step, which is the base model's."""
        return self.record.curve[0][1] if self.record.curve and self.record.curve[0][0] == 0 else None


def ended(spec: PhaseSpec) -> list[Ended]:
    """Run the trials of a phase that have not ended; all of them at their ends, in the order of the space.

    Raises UserError for a trial that failed for another reason than its learning rate. The next call runs it again.
    """
    if search_folder.progress(spec.folder).complete and _failures(_records(spec)):
        _open_again(spec.folder)
    with noted(spec.root, lambda: trained(spec.folder)):
        run.search(spec)
    records = _records(spec)
    _check_values(spec, records)
    if failed := _failures(records):
        number, reason = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"{spec.folder}: {trial_name(number)} failed{more}: {reason}; remove the cause and run the same command"
            " again: trials that have ended stay as they are"
        )
    return [Ended(record, loss_of(record)) for record in records if record is not None]


def trained(folder: str) -> int:
    """Changes with whatever is trained in a phase: its trials, and how far they are."""
    return sum(1 + record.step for record in records.read_all(folder).values())


def _check_values(spec: PhaseSpec, records: Sequence[TrialRecord | None]) -> None:
    """Raise UserError if a trial was another one: the learning rates that a grid begins with are a version's."""
    for number, record in enumerate(records):
        wanted = spec.space.values(spec.space.drawn(number))
        if record is not None and any(record.params.get(field, value) != value for field, value in wanted.items()):
            shown = ", ".join(f"{field}={value}" for field, value in wanted.items())
            raise UserError(
                f"{spec.folder}: {trial_name(number)} has other values than {shown}: another version began this"
                " comparison; go on with that one, or choose another run.name"
            )


def ended_before(folder: str) -> int:
    """How many trials of a phase have ended so far; 0 for one that has not begun."""
    return sum(record.status in ("finished", "failed") for record in records.read_all(folder).values())


def loss_of(record: TrialRecord) -> float:
    """The loss after the last step; infinite for a training that broke off."""
    if record.status != "finished" or not record.curve or record.curve[-1][0] != record.total:
        return math.inf
    last = record.curve[-1][1]
    return last if math.isfinite(last) else math.inf


def seconds(folders: Sequence[str]) -> float:
    """How long phases have run, over all attempts."""
    return sum(search_folder.progress(folder).seconds for folder in folders)


def _records(spec: PhaseSpec) -> list[TrialRecord | None]:
    found = records.read_all(spec.folder)
    return [found.get(number) for number in range(spec.space.count())]


def _failures(records: Sequence[TrialRecord | None]) -> list[tuple[int, str]]:
    """(number, reason) of trials that did not come to an end."""
    failed = []
    for number, record in enumerate(records):
        if record is None:
            failed.append((number, "it left no record"))
        elif record.status != "finished" and not _broke_off(record):
            failed.append((number, record.reason or f"it is {record.status}"))
    return failed


def _broke_off(record: TrialRecord) -> bool:
    return record.status == "failed" and BROKE_OFF in record.reason and not record.reason.startswith(UNTRAINED)


def _open_again(folder: str) -> None:
    """Let a search that is over run again: its trials find in their own folders what they have done."""
    known = search_folder.progress(folder)
    storage.remove(search_folder.tune_place(folder))
    search_folder.keep(folder, search_folder.Progress(known.seconds))
