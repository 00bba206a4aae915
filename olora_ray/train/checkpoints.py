"""The checkpoints of a run: written behind the training, the newest good one found again, old ones removed.

    <run>/checkpoints/step-0000050/     see checkpoint.py
    <run>/checkpoints/.NAME.*.tmp       being written, or left by a process that was killed

A checkpoint gets its name only when it is whole: on a disk by renaming its folder, in an object store by
uploading its manifest last. Ray's own reporting is not used for them: it waits for the controller, and
resumes from the checkpoint that was reported last, whether it can be read or not.
"""

import contextvars
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from olora_ray.common import storage
from olora_ray.common.errors import UserError, short_reason
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

Saved = Callable[[int, float], None]
"""Called with the step of a checkpoint that is written, and the seconds that it took."""
PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts to write a checkpoint."""
PREFIX = "step-"


class CheckpointManager:
    """Writes the checkpoints of a run, one at a time, in a thread."""

    def __init__(self, place: str, keep: int, saved: Saved = lambda step, seconds: None) -> None:
        """`place` is the folder of the checkpoints, path or URI; `keep` the number that stay."""
        self.place, self.keep, self.saved = place, keep, saved
        self._thread: threading.Thread | None = None
        self._problem: OSError | SafetensorError | None = None
        self._bug: Exception | None = None
        _sweep(place)

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
        """Wait for the last checkpoint; raises UserError if it could not be written."""
        self._join()
        if self._problem is not None:
            raise UserError(
                f"run.storage: the last checkpoint cannot be written to {self.place}: {short_reason(self._problem)};"
                " make room or repair the storage, and run the same command again"
            )

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
        for pause in (*PAUSES, None):
            try:
                _put(write, storage.join(self.place, name_of(step)))
                self.saved(step, time.perf_counter() - began)
                self._retire()
                return
            except (OSError, SafetensorError) as error:
                if pause is None:
                    self._problem = error
                    there = names(self.place)
                    last = f"the last one is {there[-1]}" if there else "there is none yet"
                    logger.warning(
                        f"the checkpoint of step {step} cannot be written ({short_reason(error)}), given up after"
                        f" {len(PAUSES) + 1} attempts; training continues, {last}"
                    )
                else:
                    logger.warning(f"the checkpoint of step {step} is tried again: {short_reason(error)}")
                    time.sleep(pause)

    def _retire(self) -> None:
        # Only ever after a newer one has been written.
        for name in names(self.place)[: -self.keep]:
            _drop(storage.join(self.place, name))


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:07d}"


def names(place: str) -> list[str]:
    """Folder names of the checkpoints, the oldest first; whether they are whole is not looked at."""
    return [name for name in storage.names(place) if name.startswith(PREFIX)]


def latest_good(place: str) -> tuple[str, Checkpoint] | None:
    """The newest checkpoint that can be trusted, and its folder; those that cannot are passed over with a warning."""
    for name in reversed(names(place)):
        folder = storage.join(place, name)
        try:
            return folder, read(folder)
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
        with tempfile.TemporaryDirectory(prefix="olora-checkpoint-") as cache:
            local = storage.local_copy(wanted, cache)
            _put(lambda folder: shutil.copytree(local, folder, dirs_exist_ok=True), storage.join(place, name_of(step)))
    for name in names(place):
        if name > name_of(step):
            _drop(storage.join(place, name))


def read(folder: str) -> Checkpoint:
    """The checkpoint in a folder; raises UserError if it is not whole."""
    if not storage.is_uri(folder):
        return checkpoint.load(Path(folder))
    with tempfile.TemporaryDirectory(prefix="olora-checkpoint-") as cache:
        try:
            return checkpoint.load(storage.local_copy(folder, cache))
        except OSError as error:
            raise UserError(f"checkpoint {folder}: cannot be read: {short_reason(error)}") from None


def _put(write: Callable[[Path], object], target: str) -> None:
    if storage.is_uri(target):
        with tempfile.TemporaryDirectory(prefix="olora-checkpoint-") as local:
            write(Path(local))
            storage.upload(Path(local), target, last=checkpoint.MANIFEST)
        return
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = storage.beside(final)
    try:
        write(folder)
        # What lies there has the same step: a damaged one that was passed over, or one that an earlier
        # attempt of this run wrote while it was already given up.
        if final.exists():
            _drop(target)
        os.rename(folder, final)
        storage.flush_to_disk(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _drop(target: str) -> None:
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


def _sweep(place: str) -> None:
    """Remove what killed processes have left half-written."""
    if not storage.is_uri(place) and Path(place).is_dir():
        for folder in Path(place).glob(".step-*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)
