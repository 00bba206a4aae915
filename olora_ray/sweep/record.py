"""Records of a search: one per trial, and one of the whole search that ranks the trials."""

import json
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from olora_ray.common import records, storage
from olora_ray.common.errors import as_user_error, short_reason

logger = logging.getLogger(__name__)

Curve = tuple[tuple[int, float], ...]
"""(step, value), in order of steps."""
Mode = Literal["min", "max"]
# stopped: by the scheduler, because other trials did better; unfinished: the search ended before the trial did.
Status = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial. Its JSON form is trial.json."""

    number: int
    """Counted from 0, in the order of the search."""
    params: dict[str, Any]
    """Dotted config field -> value."""
    status: Status
    value: float | None = None
    """Best value of the metric so far; None if it was never measured."""
    step: int = 0
    total: int = 0
    """Steps of the complete training; 0 if unknown."""
    curve: Curve = ()
    """(step, metric), in order of steps."""
    seconds: float = 0.0
    """From start to end, over all attempts."""
    first_step: float | None = None
    """Seconds from the start of the trial to the end of its first step."""
    spared: float = 0.0
    """Seconds of preparation and initialisation that the search did once for all trials."""
    reason: str = ""
    """Reason of a failure or a stop."""
    folder: str = ""
    """Its run folder."""
    mlflow_run: str = ""
    compared: Curve = ()
    """(step, training loss) by which the scheduler compared the trial with others, in order of steps."""

    def measured(self) -> bool:
        """True if the trial has a value to rank it by: NaN and infinity do not count."""
        return self.value is not None and math.isfinite(self.value)


@dataclass(frozen=True)
class SearchRecord:
    """A search with all its trials. Its JSON form is leaderboard.json."""

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
    """Number of the trial with the unchanged config; None if there is none."""
    notes: tuple[str, ...] = field(default=())
    """Sentences about the search as a whole, e.g. why it ended early."""

    def sign(self) -> int:
        """Return the factor that makes a lower value of the metric the better one."""
        return 1 if self.mode == "min" else -1

    def ranked(self) -> list[TrialRecord]:
        """Return the trials that have a value, the best first; failed ones come last, whatever their value."""

        def place(trial: TrialRecord) -> tuple[bool, float, int]:
            return trial.status == "failed", self.sign() * (trial.value or 0.0), trial.number

        return sorted([trial for trial in self.trials if trial.measured()], key=place)

    def ordered(self) -> list[TrialRecord]:
        """Return all trials: the ranked ones, then those without a value in the order of the search."""
        rest = [trial for trial in self.trials if not trial.measured()]
        return self.ranked() + sorted(rest, key=lambda trial: trial.number)

    def best(self) -> TrialRecord | None:
        return next(iter(self.ranked()), None)

    def unchanged(self) -> TrialRecord | None:
        """Return the trial with the unchanged config."""
        return next((trial for trial in self.trials if trial.number == self.default), None)

    def to_json(self) -> str:
        """Return the text of leaderboard.json, the best trial first; NaN and infinity become null."""
        content = {**asdict(self), "trials": [asdict(trial) for trial in self.ordered()]}
        return json.dumps(finite(content), indent=1, allow_nan=False, default=str) + "\n"


def finite(value: Any) -> Any:
    """Return a plain value with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# trial.json: the trial writes its record so far into its folder, and the driver reads it.

FILE = "trial.json"


class TrialFile:
    def __init__(self, folder: str, record: TrialRecord, mode: Mode) -> None:
        # Nothing is written before `begin`: Tune starts a process for a trial, but may run the trial in another process
        # that became free earlier. If the late process wrote here, it would overwrite the progress of the trial.
        self.path = storage.join(folder, FILE)
        self.mode = mode
        self.record = replace(record, folder=folder)
        self._began = time.monotonic()
        self._previous = read_record(folder)
        self._seconds = 0.0
        if self._previous:
            self._seconds = self._previous.seconds
            self.record = replace(self.record, first_step=self._previous.first_step)

    def begin(self) -> None:
        self._write()

    def keep_curve(self, step: int) -> None:
        """Keep the curve up to a checkpoint of this trial that exists although Tune does not know of it."""
        if self._previous and self._previous.params == self.record.params:
            self._take(tuple(point for point in self._previous.curve if point[0] <= step))

    def started(self) -> None:
        if self.record.first_step is None:
            self.record = replace(self.record, first_step=time.monotonic() - self._began)

    def measured(self, step: int, value: float) -> None:
        # Rows arrive late, and again after a restart of the workers.
        points = dict(self.record.curve)
        if points.get(step) != value:
            self._take(tuple(sorted((points | {step: value}).items())))
            self._write()

    def compared(self, step: int, loss: float) -> None:
        self.record = replace(
            self.record, step=step, compared=(*self.record.compared, (step, loss))
        )
        self._write()

    def ended(self, status: Status, reason: str = "") -> None:
        self.record = replace(self.record, status=status, reason=reason)
        self._write()

    def _take(self, curve: Curve) -> None:
        values = [value for step, value in curve if step]  # at step 0 it is the base model's
        choose = min if self.mode == "min" else max
        last = max([self.record.step, *(step for step, _ in curve)])
        best = choose(values, default=None)
        self.record = replace(self.record, curve=curve, step=last, value=best)

    def _write(self) -> None:
        self.record = replace(self.record, seconds=self._seconds + time.monotonic() - self._began)
        try:
            records.write(self.path, self.record)
        except OSError as error:
            # The next write has everything. The training does not need the file.
            logger.warning(
                f"{self.path}: cannot be written now ({short_reason(error)}); the trial continues"
            )


def read_record(folder: str) -> TrialRecord | None:
    """Return the record of the trial in `folder`; None if there is no readable one.

    Its field `folder` is set to this folder, because the search may have moved. Raises OSError if the storage is
    unreachable.
    """
    record = records.read(storage.join(folder, FILE), TrialRecord)
    return record and replace(record, folder=folder)


def read_all(folder: str) -> dict[int, TrialRecord]:
    """Return number -> record for all trials of the search in `folder`.

    Raises UserError if a record cannot be read, and TryAgain if an object store does not answer: the report must not
    miss a trial.
    """
    trials = storage.join(folder, "trials")
    failure = f"{trials}: cannot read the records of the trials"
    # In parallel: an object store answers slowly, and a search may have thousands of records.
    with as_user_error(failure, OSError, reason=short_reason), ThreadPoolExecutor(16) as pool:
        found = pool.map(
            read_record, [storage.join(trials, name) for name in storage.names(trials)]
        )
        return {record.number: record for record in found if record}
