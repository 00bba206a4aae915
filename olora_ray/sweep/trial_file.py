"""trial.json: the record of a trial so far, written by the trial in its folder and read by the driver."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from pydantic import TypeAdapter

from olora_ray.common import storage
from olora_ray.common.errors import as_user_error, short_reason
from olora_ray.sweep.record import Mode, Status, TrialRecord

logger = logging.getLogger(__name__)

FILE = "trial.json"
READERS = 16
"""Records that are read at the same time: an object store takes long to answer, and thousands are asked for."""
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
    with as_user_error(what, OSError, reason=short_reason), ThreadPoolExecutor(READERS) as pool:
        found = pool.map(read, [storage.join(trials, name) for name in storage.names(trials)])
        return {record.number: record for record in found if record}
