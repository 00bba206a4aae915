"""Writes the checkpoints of a run behind its training, and removes those that are no longer needed."""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from olora_ray.common import storage
from olora_ray.common.errors import StoreUnavailable, TryAgain, UserError, short_reason
from olora_ray.common.text import plural
from olora_ray.train import checkpoint, checkpoints

logger = logging.getLogger(__name__)

Saved = Callable[[int, float], None]
"""Called with the step of a checkpoint that is written, and the seconds that it took."""
PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts to write a checkpoint."""
ATTEMPT_SECONDS = 120.0
"""After so many seconds no other attempt is made: the training waits for the one that is under way."""


class _AbandonedError(Exception):
    """Another process writes the checkpoints by now."""


class CheckpointManager:
    """Writes the checkpoints of a run, one at a time, in a thread."""

    def __init__(self, place: str, keep: int, saved: Saved = lambda step, seconds: None) -> None:
        """`place` is the folder of the checkpoints, path or URI; `keep` the number of good ones that stay.

        Removes what killed processes have left half-written there.
        """
        self.place, self.keep, self.saved = place, keep, saved
        self._good: set[str] = set()  # names that this process has written or verified
        self._thread: threading.Thread | None = None
        self._problem: OSError | SafetensorError | None = None
        self._bug: Exception | None = None
        self._abandoned = threading.Event()
        checkpoints.sweep(place)
        self._found = checkpoints.steps_now(place)  # those that were there before

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Have `write` fill a folder, which becomes the checkpoint of `step`; waits for the one before.

        A checkpoint that cannot be written is reported, and the training continues without it.
        """
        self._join()
        self._problem = None
        # Its lines belong to the training that it writes for: several may share this process.
        work = partial(contextvars.copy_context().run, self._save, step, write)
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last checkpoint; raises UserError if it could not be written, TryAgain if that passes."""
        self._join()
        if self._problem is not None:
            away = isinstance(self._problem, StoreUnavailable) or getattr(self._problem, "errno", 0) in checkpoint.AWAY
            raise (TryAgain if away else UserError)(
                f"run.storage: the last checkpoint cannot be written to {self.place}: {short_reason(self._problem)};"
                " make room or repair the storage, and run the same command again"
            )

    def abandon(self) -> None:
        """Write nothing more, and remove nothing: another process writes the checkpoints. Does not wait.

        What is being written gets no name, unless that is under way.
        """
        self._abandoned.set()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug

    def _save(self, step: int, write: Callable[[Path], None]) -> None:
        try:
            self._try(step, write)
        except Exception as error:
            self._bug = error  # raised in the thread that trains

    def _try(self, step: int, write: Callable[[Path], None]) -> None:
        began = time.perf_counter()
        for number, pause in enumerate((*PAUSES, None), 1):
            try:
                checkpoints.put(partial(self._fill, write), storage.join(self.place, checkpoints.name_of(step)))
            except _AbandonedError:
                return
            except (OSError, SafetensorError) as error:
                if self._abandoned.is_set():
                    return
                if pause is None or time.perf_counter() - began > ATTEMPT_SECONDS:
                    self._problem = error
                    there = checkpoints.names_now(self.place)
                    last = f"the last one is {there[-1]}" if there else "there is none yet"
                    logger.warning(
                        f"the checkpoint of step {step} cannot be written ({short_reason(error)}), given up after"
                        f" {plural(number, 'attempt')}; training continues, {last}"
                    )
                    return
                logger.warning(f"the checkpoint of step {step} is tried again: {short_reason(error)}")
                time.sleep(pause)
            else:
                if self._abandoned.is_set():
                    return
                self.saved(step, time.perf_counter() - began)
                self._retire(step)
                return

    def _fill(self, write: Callable[[Path], None], folder: Path) -> None:
        """Have `write` fill the folder, which gets its name if this returns."""
        write(folder)
        if self._abandoned.is_set():
            raise _AbandonedError

    def _retire(self, step: int) -> None:
        """Remove what the checkpoint that was just written makes superfluous.

        That is all but the newest `keep` good ones of steps until now, and damaged ones of later steps that were there
        before: the training comes from an earlier one, since they could not be used. Other ones of later steps are of
        whoever goes on with the run, should this process have been given up, or are good: the bytes are the same.
        """
        self._good.add(checkpoints.name_of(step))
        kept = 0
        try:
            for found in sorted(checkpoints.steps_of(self.place), reverse=True):
                name = checkpoints.name_of(found)
                if found > step and (found not in self._found or self._may_be_good(name)):
                    continue
                if self._abandoned.is_set():
                    return
                if found > step or kept == self.keep or not self._is_good(name):
                    checkpoints.drop(storage.join(self.place, name))
                    self._good.discard(name)
                else:
                    kept += 1
        except OSError as error:
            logger.warning(f"old checkpoints cannot be removed now: {short_reason(error)}")

    def _may_be_good(self, name: str) -> bool:
        """Whether the checkpoint is whole, or cannot be read now: then it stays, and the others are looked at."""
        try:
            return self._is_good(name)
        except OSError:
            return True

    def _is_good(self, name: str) -> bool:
        """Whether the checkpoint is whole; each is looked at once. Raises OSError if that cannot be said now."""
        if name not in self._good and checkpoints.is_whole(storage.join(self.place, name)):
            self._good.add(name)
        return name in self._good
