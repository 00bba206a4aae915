"""A phase of a comparison: its trials as one search, and what each of them came to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.sweep import progress, run, state, trial_file
from olora_ray.sweep.compare import code_used
from olora_ray.sweep.compare.spec import PhaseSpec
from olora_ray.sweep.record import TrialRecord
from olora_ray.sweep.spec import trial_name

BROKE_OFF = "not finite"
"""In the reason of a training whose loss or gradient became no number: the learning rate was too large for it."""
UNTRAINED = "step 0:"
"""Begins the reason if the loss was none before training: that is the base's, or the rows'."""


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
    if progress.read(spec.folder).complete and _failures(_records(spec)):
        _open_again(spec.folder)
    with code_used.noted(spec.root, lambda: trained(spec.folder)):
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
    return sum(1 + record.step for record in trial_file.read_all(folder).values())


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
    return sum(record.status in ("finished", "failed") for record in trial_file.read_all(folder).values())


def loss_of(record: TrialRecord) -> float:
    """The loss after the last step; infinite for a training that broke off."""
    if record.status != "finished" or not record.curve or record.curve[-1][0] != record.total:
        return math.inf
    last = record.curve[-1][1]
    return last if math.isfinite(last) else math.inf


def seconds(folders: Sequence[str]) -> float:
    """How long phases have run, over all attempts."""
    return sum(progress.read(folder).seconds for folder in folders)


def _records(spec: PhaseSpec) -> list[TrialRecord | None]:
    found = trial_file.read_all(spec.folder)
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
    known = progress.read(folder)
    storage.remove(state.place(folder))
    progress.write(folder, progress.Progress(known.seconds))
