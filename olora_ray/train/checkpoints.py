"""The checkpoints of a run as folders: listing, reading, writing and removing them.

    <run>/checkpoints/step-0000050/     see checkpoint.py
    <run>/checkpoints/.NAME.*.tmp       being written, or left by a process that was killed

A checkpoint becomes visible only when it is complete. On a disk its folder is renamed last; in an object store its
manifest is uploaded last, and a folder without a manifest is ignored. Only the last one is reported to Ray: reporting
waits for the controller, and Ray resumes from the checkpoint reported last even if that cannot be read.
"""

import contextlib
import contextvars
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import (
    StoreUnavailable,
    TryAgain,
    UserError,
    as_user_error,
    short_reason,
)
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

PREFIX = "step-"
AWAY = frozenset({errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN})
"""Errors of a mounted storage that is unreachable at the moment."""


class Closed(UserError):
    """Error for a checkpoint that this user may not read."""


def name_of(step: int) -> str:
    return f"{PREFIX}{step:07d}"


def names(root: str) -> list[str]:
    """Return the folder names of the checkpoints, oldest first, without a check for damage."""
    steps = steps_of(root)
    if storage.is_uri(root):
        files = storage.files_below(root)
        steps = [step for step in steps if f"{name_of(step)}/{checkpoint.MANIFEST}" in files]
    return [name_of(step) for step in sorted(steps)]


def steps_of(root: str) -> list[int]:
    numbers = (name.removeprefix(PREFIX) for name in storage.names(root) if name.startswith(PREFIX))
    return [int(number) for number in numbers if number.isdecimal()]


@dataclass(frozen=True)
class Kept:
    """The facts in a checkpoint's state.json that others than a training need."""

    identity: dict[str, str]
    precision: Literal["float32", "bfloat16", "float16"] | None = None


def newest(root: str) -> tuple[int | None, Kept]:
    """Return the step of the newest checkpoint, which may be damaged, and the facts of the newest readable one."""
    listed = names(root)
    files = (storage.join(root, name, checkpoint.STATE) for name in reversed(listed))
    kept = next(filter(None, (records.read(file, Kept) for file in files)), Kept({}))
    return (int(listed[-1].removeprefix(PREFIX)) if listed else None), kept


def latest_good(root: str) -> tuple[str, Checkpoint] | None:
    """Return the folder and content of the newest good checkpoint; damaged ones are skipped with a warning.

    Raises TryAgain if the storage cannot read a checkpoint now, because it may be good. Raises Closed for a checkpoint
    that this user may not read.
    """
    failure = f"{root}: the checkpoints cannot be listed"
    with as_user_error(failure, OSError, reason=short_reason, passes=lambda _: True):
        listed = names(root)
    for name in reversed(listed):
        folder = storage.join(root, name)
        try:
            return folder, read(folder)
        except UserError as error:
            if isinstance(error, TryAgain | Closed):
                raise
            logger.warning(f"{name} is skipped: {error}")
    return None


def read(folder: str) -> Checkpoint:
    """Read a checkpoint; raises UserError if it is missing or damaged, Closed or TryAgain if it cannot be read."""
    try:
        with node_cache.fetched(folder) as local:
            return checkpoint.load(local)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {folder}: missing: {short_reason(error)}") from None
    except PermissionError as error:
        raise Closed(f"checkpoint {folder}: cannot be read: {short_reason(error)}") from None
    except OSError as error:
        why = short_reason(error)
        raise TryAgain(
            f"checkpoint {folder}: cannot be read: {why}; if this persists, remove it"
        ) from None


def put(write: Callable[[Path], object], target: str) -> None:
    """Let `write` fill a folder, and move or upload it to `target` (path or URI); an existing `target` is replaced.

    Raises OSError, or the error of `write`; an incomplete checkpoint never becomes visible at `target`.
    """
    if storage.is_uri(target):
        with tempfile.TemporaryDirectory(prefix="olora-checkpoint-") as local:
            write(Path(local))
            # An upload that was cut off may have left files, which must not mix with the new ones.
            if storage.files_below(target):
                drop(target)
            node_cache.upload(Path(local), target, last=checkpoint.MANIFEST)
        return
    final = Path(target)
    with storage.staged(final) as folder:
        write(folder)
        # A checkpoint of the same step may exist already: a damaged one that the resume has skipped, or one that an
        # earlier attempt of this run wrote after it was given up.
        if final.exists():
            drop(target)
    storage.flush_to_disk(final.parent)


def drop(target: str) -> None:
    """Delete a checkpoint; its name or manifest goes first, so that nobody reads a half-deleted one."""
    if storage.is_uri(target):
        storage.remove(storage.join(target, checkpoint.MANIFEST))
        storage.remove(target)
        return
    final = Path(target)
    discarded = storage.beside(final)
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def sweep(root: str) -> None:
    if not storage.is_uri(root):
        for folder in Path(root).glob(".step-*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        complete = set(names(root))
        for name in map(name_of, steps_of(root)):
            if name not in complete:
                storage.remove(storage.join(root, name))
    except (OSError, UserError) as error:
        logger.warning(f"{root}: incomplete checkpoints cannot be removed: {short_reason(error)}")


# Checkpoints are written in the background of the training, and those that are no longer needed are removed.


Saved = Callable[[int, float], None]
"""Called with the step of a written checkpoint, and the seconds that writing took."""


class CheckpointManager:
    def __init__(self, root: str, keep: int, saved: Saved = lambda step, seconds: None) -> None:
        """Remove incomplete checkpoints, and prepare to write into the folder `root` (path or URI).

        `keep` checkpoints stay.
        """
        self.root = root
        self.keep = keep
        self.saved = saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[None] | None = None
        self._problem: OSError | SafetensorError | None = None
        sweep(root)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder in the background, as the checkpoint of `step`; waits for the previous checkpoint.

        If it cannot be written, a warning is logged and the training continues.
        """
        self._join()
        self._problem = None
        # The context says to which training a log line belongs, because several trials may share this process.
        self._work = self._pool.submit(contextvars.copy_context().run, self._save, step, write)

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises UserError if it could not be written, or TryAgain if the storage is only unreachable.
        """
        self._join()
        if self._problem is not None:
            unreachable = (
                isinstance(self._problem, StoreUnavailable)
                or getattr(self._problem, "errno", 0) in AWAY
            )
            raise (TryAgain if unreachable else UserError)(
                f"run.storage: the last checkpoint cannot be written to {self.root}: {short_reason(self._problem)};"
                " free space or repair the storage, and run the same command again to resume"
            )

    def _join(self) -> None:
        if self._work is not None:
            self._work.result()

    def _save(self, step: int, write: Callable[[Path], None]) -> None:
        began = time.perf_counter()
        try:
            put(write, storage.join(self.root, name_of(step)))
        except (OSError, SafetensorError) as error:
            self._problem = error
            logger.warning(
                f"the checkpoint of step {step} cannot be written ({short_reason(error)}); training continues"
            )
            return
        self.saved(step, time.perf_counter() - began)
        # Up to `step`, the newest `keep` checkpoints stay. One of a later step stays: it may be good, with the bytes
        # that this training will write again. Or this process was given up without knowing it, and the process that
        # resumed the run has written the checkpoint.
        try:
            earlier = [name for name in names(self.root) if name <= name_of(step)]
            for name in earlier[: -self.keep]:
                drop(storage.join(self.root, name))
        except OSError as error:
            logger.warning(f"{self.root}: old checkpoints cannot be removed: {short_reason(error)}")
