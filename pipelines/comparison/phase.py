"""A phase of a comparison: a search with a fixed list of trials, and the result of each trial."""

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
"""Part of the reason if a training's loss or gradient became NaN or infinite: its learning rate was too large."""
UNTRAINED = "step 0:"
"""Start of the reason if the loss was not finite before training: then the base model or the rows are the cause."""
PLACE = "place"
"""Key of the only draw: the position in the list of trials."""


class FixedTrials(Space):
    """A search without a choice: every trial of a list, once and to its last step."""

    of_trials: tuple[dict[str, Any], ...]
    """Dotted field -> value, for each trial."""

    @classmethod
    def of(cls, trials: Sequence[Mapping[str, Any]]) -> "FixedTrials":
        """Return the space of these trials, which must all name the same fields."""
        values = {field: list(dict.fromkeys(trial[field] for trial in trials)) for field in trials[0]}
        return cls(
            search={field: Domain(choice=tuple(choices)) for field, choices in values.items()},
            set={},
            searcher="grid",
            scheduler=Scheduler(kind="none"),
            include_default=False,
            of_trials=tuple(dict(trial) for trial in trials),
        )

    def count(self) -> int:
        return len(self.of_trials)

    def cells(self) -> int:
        # The list has few of the combinations of its values, so a product would be wrong.
        return len(self.of_trials)

    def drawn(self, number: int) -> dict[str, Any]:
        return {PLACE: number}

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        raise NotImplementedError("the trials are fixed")

    def draw_names(self) -> list[str]:
        return [PLACE]

    def values(self, draws: Draws) -> dict[str, Any]:
        return dict(self.of_trials[draws[PLACE]]) if PLACE in draws else {}

    def as_draws(self, config: Config) -> None:
        """Return None: no trial of the list needs to be the config itself."""


@dataclass(frozen=True)
class PhaseSpec(SweepSpec):
    """A search in which all rounds share the base model and each method's factors, and each seed has its own tokens."""

    root: str = ""
    """The comparison's folder; `folder` is the phase's."""
    specs: Mapping[int, TrainSpec] = field(default_factory=dict)
    """run.seed -> specification with the tokens in this seed's order."""

    def spec_of(self, config: Config) -> TrainSpec:
        # In the final phase each trial computes its factors itself, as a run would: they depend on the seed.
        seed = config.run.seed
        name = config.adapter.method if self.folder != storage.join(self.root, FINAL) else f"seed-{seed}"
        return replace(self.specs[seed], config=config, shared=shared_place(self.root, name))

    def shares_data(self) -> bool:
        """True: all trials have the same base model, and all trials of a seed the same tokens."""
        return True


@dataclass(frozen=True)
class Ended:
    record: TrialRecord
    loss: float
    """Held-out loss of the adapter after the last step; infinite if the training broke off."""

    def base(self) -> float | None:
        """Return the held-out loss before the first step, which is the base model's; None if it was not measured."""
        return self.record.curve[0][1] if self.record.curve and self.record.curve[0][0] == 0 else None


def ended(spec: PhaseSpec) -> list[Ended]:
    """Run the trials of a phase that have not ended, and return all of them in the order of the space.

    Raises UserError if a trial failed for another reason than its learning rate. The next call runs it again.
    """
    # A search that is complete does not run again, not even its failed trials.
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
            " again: it keeps the trials that have ended"
        )
    return [Ended(record, loss_of(record)) for record in records if record is not None]


def trained(folder: str) -> int:
    """Return a number that changes with every training step of a phase."""
    return sum(1 + record.step for record in records.read_all(folder).values())


def _check_values(spec: PhaseSpec, records: Sequence[TrialRecord | None]) -> None:
    # Each version of olora_ray has its own first learning rates, so another version may have begun this comparison.
    for number, record in enumerate(records):
        wanted = spec.space.values(spec.space.drawn(number))
        if record is not None and any(record.params.get(field, value) != value for field, value in wanted.items()):
            shown = ", ".join(f"{field}={value}" for field, value in wanted.items())
            raise UserError(
                f"{spec.folder}: {trial_name(number)} has other values than {shown}, because another version began"
                " this comparison; resume with that version, or choose another run.name"
            )


def ended_before(folder: str) -> int:
    return sum(record.status in ("finished", "failed") for record in records.read_all(folder).values())


def loss_of(record: TrialRecord) -> float:
    """Return the loss after the last step; infinite for a training that broke off."""
    if record.status != "finished" or not record.curve or record.curve[-1][0] != record.total:
        return math.inf
    last = record.curve[-1][1]
    return last if math.isfinite(last) else math.inf


def seconds(folders: Sequence[str]) -> float:
    return sum(search_folder.progress(folder).seconds for folder in folders)


def _records(spec: PhaseSpec) -> list[TrialRecord | None]:
    by_number = records.read_all(spec.folder)
    return [by_number.get(number) for number in range(spec.space.count())]


def _failures(records: Sequence[TrialRecord | None]) -> list[tuple[int, str]]:
    failed = []
    for number, record in enumerate(records):
        if record is None:
            failed.append((number, "it has no record"))
        elif record.status != "finished" and not _broke_off(record):
            failed.append((number, record.reason or f"it is {record.status}"))
    return failed


def _broke_off(record: TrialRecord) -> bool:
    # Such a trial is a result: the learning rate is too large. Any other failure has a cause to remove.
    return record.status == "failed" and BROKE_OFF in record.reason and not record.reason.startswith(UNTRAINED)


def _open_again(folder: str) -> None:
    # Ray Tune's state is removed, so that the search runs again; its trials resume from their own folders.
    known = search_folder.progress(folder)
    storage.remove(search_folder.tune_place(folder))
    search_folder.keep(folder, search_folder.Progress(known.seconds))
