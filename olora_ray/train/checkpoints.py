"""The checkpoints of a run as folders: found, read, put in their place, removed.

    <run>/checkpoints/step-0000050/     see checkpoint.py
    <run>/checkpoints/.NAME.*.tmp       being written, or left by a process that was killed

A checkpoint gets its name only when it is whole: on a disk by renaming its folder, in an object store by
uploading its manifest last, so that a folder without one is none. Ray's own reporting is not used for them: it waits
for the controller, and resumes from the checkpoint that was reported last, whether it can be read or not.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from olora_ray.common import copies, local_files, s3, storage
from olora_ray.common.errors import TryAgain, UserError, short_reason
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

PREFIX = "step-"
PRECISIONS = ("float32", "bfloat16", "float16")


class Closed(UserError):
    """A checkpoint is there that this user may not read."""


class Unread(UserError):
    """A checkpoint is there that the disk does not give; it may be damaged, or its storage away."""


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


def steps_now(place: str) -> frozenset[int]:
    """The same, and none where that cannot be said now."""
    try:
        return frozenset(steps_of(place))
    except (OSError, UserError):
        return frozenset()


def names_now(place: str) -> list[str]:
    """As `names`, and none where that cannot be said now."""
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

    Raises TryAgain if the storage does not give one that is there, or of several none: it may be good. Raises Closed
    for one that this user may not read.
    """
    unread: Unread | None = None
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
            unread = error if isinstance(error, Unread) else unread
    if unread is not None:  # to begin anew would be to lose all
        raise TryAgain(f"{unread}, and no other one is good; if it stays so, the disk is damaged: remove {place}")
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
        with copies.fetched(wanted) as local:
            put(lambda folder: shutil.copytree(local, folder, dirs_exist_ok=True), storage.join(place, name_of(step)))
    for found in steps_of(place):
        if found > step:
            drop(storage.join(place, name_of(found)))


def read(folder: str) -> Checkpoint:
    """The checkpoint in a folder; raises UserError if it is not whole, TryAgain if it cannot be fetched now.

    Also Closed and Unread.
    """
    try:
        with copies.fetched(folder) as local:
            return checkpoint.load(local)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {folder}: not there: {short_reason(error)}") from None
    except OSError as error:
        away = storage.is_uri(folder) or error.errno in checkpoint.AWAY
        kind = TryAgain if away else Closed if error.errno in checkpoint.CLOSED else Unread
        raise kind(f"checkpoint {folder}: cannot be read: {short_reason(error)}") from None


def is_whole(folder: str) -> bool:
    """Whether a checkpoint is there as it was written; of one in an object store only the sizes are compared."""
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
            copies.upload(Path(local), target, last=checkpoint.MANIFEST)
        return
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = local_files.beside(final)
    try:
        write(folder)
        # What lies there has the same step: a damaged one that was passed over, or one that an earlier
        # attempt of this run wrote while it was already given up.
        if final.exists():
            drop(target)
        os.rename(folder, final)
        local_files.flush_to_disk(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def drop(target: str) -> None:
    """Delete a checkpoint: it loses its name or manifest first, so that a half-deleted one is never read."""
    if storage.is_uri(target):
        storage.remove(storage.join(target, checkpoint.MANIFEST))
        storage.remove(target)
        return
    final = Path(target)
    away = local_files.beside(final)
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
        if s3.is_s3(place):
            s3.abort_uploads(place.rpartition("/")[0])  # those of exports too
    except (OSError, UserError) as error:
        logger.warning(f"what an earlier attempt left half-written stays in {place}: {short_reason(error)}")
