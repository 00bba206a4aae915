"""The checkpoints of a run as folders: found, read, put in their place, removed.

    <run>/checkpoints/step-0000050/     see checkpoint.py
    <run>/checkpoints/.NAME.*.tmp       being written, or left by a process that was killed

A checkpoint gets its name only when it is whole: on a disk by renaming its folder, in an object store by
uploading its manifest last, so that a folder without one is none. Ray's own reporting is not used for them: it waits
for the controller, and resumes from the checkpoint that was reported last, whether it can be read or not.
"""

import contextvars
import errno
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import StoreUnavailable, TryAgain, UserError, short_reason
from olora_ray.common.text import plural
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

PREFIX = "step-"
AWAY = frozenset({errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN})
"""Errors of a mounted storage that does not answer now."""
PRECISIONS = ("float32", "bfloat16", "float16")


class Closed(UserError):
    """A checkpoint is there that this user may not read."""


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:07d}"


def names(place: str) -> list[str]:
    """Folder names of the checkpoints, the oldest first; whether they are damaged is not looked at."""
    steps = steps_of(place)
    if storage.is_uri(place):
        files = storage.files_below(place)
        steps = [step for step in steps if f"{name_of(step)}/{checkpoint.MANIFEST}" in files]
    return [name_of(step) for step in sorted(steps)]


def last_step(place: str) -> int:
    """The step of the newest checkpoint; 0 if there is none. Whether it is damaged is not looked at."""
    return max((int(name.removeprefix(PREFIX)) for name in names(place)), default=0)


def steps_of(place: str) -> list[int]:
    """The steps of all folders that have the name of a checkpoint."""
    found = (name.removeprefix(PREFIX) for name in storage.names(place) if name.startswith(PREFIX))
    return [int(number) for number in found if number.isdecimal()]


def names_now(place: str) -> list[str]:
    """Return `names`, or none if the storage does not answer."""
    try:
        return names(place)
    except OSError:
        return []


def precision_now(place: str) -> str | None:
    """The precision that a run began in, as its newest checkpoint has it; None where that cannot be said now."""
    for name in reversed(names_now(place)):
        try:
            state = json.loads(storage.read_text(storage.join(place, name, checkpoint.STATE)))
            return str(state["precision"]) if state["precision"] in PRECISIONS else None
        except (OSError, ValueError, KeyError, TypeError):  # of before it was kept, or damaged
            continue
    return None


def latest_good(place: str) -> tuple[str, Checkpoint] | None:
    """The newest checkpoint that can be trusted, and its folder; damaged ones are passed over with a warning.

    Raises TryAgain if the storage does not give one that is there: it may be good. Raises Closed for one that this user
    may not read.
    """
    try:
        there = names(place)
    except OSError as error:
        raise TryAgain(f"{place}: cannot be listed now: {short_reason(error)}") from None
    for name in reversed(there):
        folder = storage.join(place, name)
        try:
            return folder, read(folder)
        except (TryAgain, Closed):
            raise
        except UserError as error:
            logger.warning(f"{name} is passed over: {error}")
    return None


def copy_from(source: str, place: str, step: int, seconds: float) -> None:
    """Let the checkpoint after `step` steps in `source` be the newest in `place`: of another run, or of this one.

    Waits so long for one that is still being written; raises UserError if there is none, or it is damaged.
    """
    wanted, end = storage.join(source, name_of(step)), time.monotonic() + seconds
    while name_of(step) not in names(source) and time.monotonic() < end:
        time.sleep(0.2)
    read(wanted)
    if source != place:
        with node_cache.fetched(wanted) as local:
            put(lambda folder: shutil.copytree(local, folder, dirs_exist_ok=True), storage.join(place, name_of(step)))
    for found in steps_of(place):
        if found > step:
            drop(storage.join(place, name_of(found)))


def read(folder: str) -> Checkpoint:
    """The checkpoint in a folder; raises UserError if it is not whole, Closed or TryAgain if it cannot be read."""
    try:
        with node_cache.fetched(folder) as local:
            return checkpoint.load(local)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {folder}: not there: {short_reason(error)}") from None
    except PermissionError as error:
        raise Closed(f"checkpoint {folder}: cannot be read: {short_reason(error)}") from None
    except OSError as error:
        why = short_reason(error)
        raise TryAgain(f"checkpoint {folder}: cannot be read: {why}; if it stays so, remove it") from None


def is_whole(folder: str) -> bool:
    """Return True if a checkpoint is there as it was written; in an object store, compare the sizes only."""
    if not storage.is_uri(folder):
        try:
            checkpoint.verify(Path(folder))
        except UserError:
            return False
        return True
    files = storage.files_below(folder)
    if checkpoint.MANIFEST not in files:
        return False
    wanted = checkpoint.sizes(storage.read_bytes(storage.join(folder, checkpoint.MANIFEST)))
    return bool(wanted) and {name: files.get(name) for name in wanted} == wanted


def put(write: Callable[[Path], object], target: str) -> None:
    """Have `write` fill a folder, and give it the name of `target`, path or URI; what is there is replaced.

    Raises OSError, or what `write` raises; nothing half-written is left under that name.
    """
    if storage.is_uri(target):
        with tempfile.TemporaryDirectory(prefix="olora-checkpoint-") as local:
            write(Path(local))
            if storage.files_below(target):  # as below; nor may files of an upload that was cut stay among these
                drop(target)
            node_cache.upload(Path(local), target, last=checkpoint.MANIFEST)
        return
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = storage.beside(final)
    try:
        write(folder)
        # What lies there has the same step: a damaged one that was passed over, or one that an earlier
        # attempt of this run wrote while it was already given up.
        if final.exists():
            drop(target)
        os.rename(folder, final)
        storage.flush_to_disk(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def drop(target: str) -> None:
    """Delete a checkpoint: it loses its name or manifest first, so that a half-deleted one is never read."""
    if storage.is_uri(target):
        storage.remove(storage.join(target, checkpoint.MANIFEST))
        storage.remove(target)
        return
    final = Path(target)
    away = storage.beside(final)
    try:
        os.rename(final, away)
    except FileNotFoundError:
        return
    shutil.rmtree(away, ignore_errors=True)


def sweep(place: str) -> None:
    """Remove what killed processes have left half-written."""
    if not storage.is_uri(place):
        for folder in Path(place).glob(".step-*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        whole = set(names(place))
        for name in map(name_of, steps_of(place)):
            if name not in whole:
                storage.remove(storage.join(place, name))
        storage.abort_uploads(place.rpartition("/")[0])  # those of exports too
    except (OSError, UserError) as error:
        logger.warning(f"what an earlier attempt left half-written stays in {place}: {short_reason(error)}")


# Writes the checkpoints of a run behind its training, and removes those that are no longer needed.


Saved = Callable[[int, float], None]
"""Called with the step of a checkpoint that is written, and the seconds that it took."""


class _AbandonedError(Exception):
    """Another process writes the checkpoints by now."""


class CheckpointManager:
    """Writes the checkpoints of a run, one at a time, in a thread."""

    def __init__(
        self,
        place: str,
        keep: int,
        saved: Saved = lambda step, seconds: None,
        pauses: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    ) -> None:
        """`place` is the folder of the checkpoints, path or URI; `keep` the number of good ones that stay.

        `pauses` are the seconds between the attempts to write one to a disk; requests to an object store are repeated
        by common/patience.py. Removes what killed processes have left half-written there.
        """
        self.place, self.keep, self.saved = place, keep, saved
        self.pauses = pauses if storage.local_path(place) else ()
        self._good: set[str] = set()  # names that this process has written or verified
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[None] | None = None
        self._problem: OSError | SafetensorError | None = None
        self._abandoned = threading.Event()
        sweep(place)
        try:
            self._found = set(steps_of(place))  # those that were there before
        except (OSError, UserError):
            self._found = set()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Have `write` fill a folder, which becomes the checkpoint of `step`; waits for the one before.

        A checkpoint that cannot be written is reported, and the training continues without it.
        """
        self._join()
        self._problem = None
        # Its lines belong to the training that it writes for: several may share this process.
        self._work = self._pool.submit(contextvars.copy_context().run, self._save, step, write)

    def finish(self) -> None:
        """Wait for the last checkpoint; raises UserError if it could not be written, TryAgain if that passes."""
        self._join()
        if self._problem is not None:
            away = isinstance(self._problem, StoreUnavailable) or getattr(self._problem, "errno", 0) in AWAY
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
        if self._work is not None:
            self._work.result()

    def _save(self, step: int, write: Callable[[Path], None]) -> None:
        began = time.perf_counter()
        for number, pause in enumerate((*self.pauses, None), 1):
            try:
                put(partial(self._fill, write), storage.join(self.place, name_of(step)))
            except _AbandonedError:
                return
            except (OSError, SafetensorError) as error:
                if self._abandoned.is_set():
                    return
                if pause is None:
                    self._problem = error
                    there = names_now(self.place)
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
        self._good.add(name_of(step))
        kept = 0
        try:
            for found in sorted(steps_of(self.place), reverse=True):
                name = name_of(found)
                if found > step and (found not in self._found or self._may_be_good(name)):
                    continue
                if self._abandoned.is_set():
                    return
                if found > step or kept == self.keep or not self._is_good(name):
                    drop(storage.join(self.place, name))
                    self._good.discard(name)
                else:
                    kept += 1
        except OSError as error:
            logger.warning(f"old checkpoints cannot be removed now: {short_reason(error)}")

    def _may_be_good(self, name: str) -> bool:
        """Return True if the checkpoint is whole, or cannot be read now: then it stays, and others may go."""
        try:
            return self._is_good(name)
        except OSError:
            return True

    def _is_good(self, name: str) -> bool:
        """Return True if the checkpoint is whole; each is read once. Raises OSError if it cannot be read now."""
        if name not in self._good and is_whole(storage.join(self.place, name)):
            self._good.add(name)
        return name in self._good
