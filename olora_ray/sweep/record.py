"""Records of a search: one per trial, and one of all that ranks them."""

import json
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from olora_ray.common import storage
from olora_ray.common.errors import as_user_error, short_reason

logger = logging.getLogger(__name__)

Mode = Literal["min", "max"]
Status = Literal["finished", "stopped", "failed", "unfinished"]
"""stopped: by the scheduler, because others did better; unfinished: the search ended before the trial did."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial."""

    number: int
    """Counted from 0, in the order of the search."""
    params: dict[str, Any]
    """Dotted config field -> value; of population-based training the last values."""
    status: Status
    value: float | None = None
    """Best value of the metric so far; None if it was never measured."""
    step: int = 0
    """Optimizer steps done."""
    total: int = 0
    """Steps of its whole training; 0 if that is not known."""
    curve: tuple[tuple[int, float], ...] = ()
    """(step, metric), in order of steps."""
    seconds: float = 0.0
    """From start to end, over all attempts."""
    first_step: float | None = None
    """Seconds from the start of the trial to the end of its first step."""
    spared: float = 0.0
    """Seconds of preparation and initialisation that the search did once and this trial not again."""
    reason: str = ""
    """Reason of a failure or a stop."""
    folder: str = ""
    """The trial's run folder."""
    mlflow_run: str = ""

    def measured(self) -> bool:
        """Whether there is a value to rank it by; NaN and infinity are none."""
        return self.value is not None and math.isfinite(self.value)


@dataclass(frozen=True)
class SearchRecord:
    """A whole search."""

    name: str
    metric: str
    mode: Mode
    searcher: str
    scheduler: str
    seconds: float
    trials: tuple[TrialRecord, ...]
    fields: tuple[str, ...]
    """Dotted config fields that are searched, in the order of the space file."""
    default: int | None = None
    """Number of the trial that has the config as it is."""
    notes: tuple[str, ...] = field(default=())
    """Sentences about the search as a whole, e.g. why it ended early."""

    def ranked(self) -> list[TrialRecord]:
        """The trials that have a value, the best first; those that failed come last, whatever they had measured."""
        sign = 1 if self.mode == "min" else -1
        measured = [trial for trial in self.trials if trial.measured()]
        return sorted(measured, key=lambda trial: (trial.status == "failed", sign * (trial.value or 0.0), trial.number))

    def ordered(self) -> list[TrialRecord]:
        """All trials: the ranked, then those without a value in the order of the search."""
        rest = [trial for trial in self.trials if not trial.measured()]
        return self.ranked() + sorted(rest, key=lambda trial: trial.number)

    def best(self) -> TrialRecord | None:
        """The trial with the best value, of those that did not fail if there is one."""
        return next(iter(self.ranked()), None)

    def thinned(self, most: int) -> "SearchRecord":
        """The same search with at most `most` trials, evenly from the best to the worst; the default stays."""
        last = len(self.trials) - 1
        if last < most:
            return self
        ordered = self.ordered()
        kept = {ordered[round(place * last / (most - 1))].number for place in range(most)}
        if self.default is not None and self.default not in kept:
            kept = {*sorted(kept - {ordered[0].number})[1:], ordered[0].number, self.default}
        return replace(self, trials=tuple(trial for trial in self.trials if trial.number in kept))

    def of(self, number: int | None) -> TrialRecord | None:
        """The trial with this number."""
        return next((trial for trial in self.trials if trial.number == number), None)

    def columns(self) -> list[str]:
        """The searched fields, then whatever else trials set, in the order of appearance."""
        others = (name for trial in self.trials for name in trial.params)
        return list(dict.fromkeys([*self.fields, *others]))

    def to_json(self) -> str:
        """The text of leaderboard.json, the best trial first; NaN and infinity become null, as JSON has neither."""
        content = {**asdict(self), "trials": [asdict(trial) for trial in self.ordered()]}
        return json.dumps(_finite(content), indent=1, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


# trial.json: the record of a trial so far, written by the trial in its folder and read by the driver.


FILE = "trial.json"
_RECORD = TypeAdapter(TrialRecord)


class TrialFile:
    """Writes the record of one trial, from the trial's process."""

    def __init__(self, place: str, record: TrialRecord, mode: Mode) -> None:
        """`record` has what is known at the start; seconds of earlier attempts are taken over from the file.

        Nothing is written before the trial begins: Tune starts a process for it, and runs it in another one that is
        free earlier; the process that comes late would write over what the trial has come to.
        """
        self.place, self.mode = storage.join(place, FILE), mode
        self._began = time.monotonic()
        self._previous = read(place)
        self._seconds = self._previous.seconds if self._previous else 0.0
        if self._previous and self._previous.first_step is not None:
            record = replace(record, first_step=self._previous.first_step)
        self.record = replace(record, folder=place)

    def begin(self) -> None:
        """The trial begins, or goes on."""
        self._write()

    def goes_on(self, step: int) -> None:
        """The trial's own checkpoint of this step is there, which Tune need not know of: keep what it came from."""
        if not self.record.curve and self._previous and self._previous.params == self.record.params:
            self.resume_from(step)

    def resume_from(self, step: int, other: TrialRecord | None = None) -> None:
        """Keep what an earlier attempt has measured up to a step; or `other`, a trial whose checkpoint is taken over.

        The value of a trial is then that of the best adapter in its checkpoint.
        """
        source = other or self._previous
        curve = source.curve if source else ()
        self._take(tuple(point for point in curve if point[0] <= step))

    def started(self) -> None:
        """The first step has been done."""
        if self.record.first_step is None:
            self.record = replace(self.record, first_step=time.monotonic() - self._began)

    def measured(self, step: int, value: float) -> None:
        """The metric has been measured after `step` steps."""
        self._take((*(point for point in self.record.curve if point[0] < step), (step, value)))
        self._write()

    def ended(self, status: Status, reason: str = "") -> None:
        """The trial is over, for now."""
        self.record = replace(self.record, status=status, reason=reason)
        self._write()

    def _take(self, curve: tuple[tuple[int, float], ...]) -> None:
        choose = min if self.mode == "min" else max
        best = choose((value for step, value in curve if step), default=None)  # before the first step all are the base
        self.record = replace(self.record, curve=curve, step=curve[-1][0] if curve else 0, value=best)

    def _write(self) -> None:
        self.record = replace(self.record, seconds=self._seconds + time.monotonic() - self._began)
        try:
            storage.write_text(self.place, json.dumps(asdict(self.record)))
        except OSError as error:  # the next one has it all; the training does not depend on it
            logger.warning(f"{self.place} cannot be written now, the trial continues: {short_reason(error)}")


def read(place: str) -> TrialRecord | None:
    """The record of the trial in a folder; None if there is none, or it is damaged.

    Its `folder` is this one: that of the file is where the search lay when it was written. Raises OSError if the
    storage does not give one that may be there.
    """
    try:
        return replace(_RECORD.validate_json(storage.read_text(storage.join(place, FILE))), folder=place)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the second: somebody's file beside the folders
        return None


def read_all(folder: str) -> dict[int, TrialRecord]:
    """Number -> record of all trials of the search in `folder`.

    Raises UserError if one cannot be read now, and TryAgain if an object store does not answer: a report would miss it.
    """
    trials = storage.join(folder, "trials")
    what = f"{trials}: the records of the trials cannot be read now"
    # An object store takes long to answer, and thousands are asked for.
    with as_user_error(what, OSError, reason=short_reason), ThreadPoolExecutor(16) as pool:
        found = pool.map(read, [storage.join(trials, name) for name in storage.names(trials)])
        return {record.number: record for record in found if record}
