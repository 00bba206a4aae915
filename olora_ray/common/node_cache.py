"""Bound of what a node keeps of things that lie elsewhere: models and shards that its processes have fetched.

A cache is a folder whose entries (files or folders) are made anew when they are missing. `make_room` removes those
that were not used for longest; never one that a living process holds, or that was used a moment ago.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

SHARE = 0.25
"""Part of its disk that a cache may fill."""
MOMENT = 600.0
"""Seconds after its last use in which an entry stays: somebody may be about to open it."""
ABANDONED = 24 * 3600.0
"""Seconds after which a half-written entry is one that a killed process has left."""
_held: dict[Path, TextIO] = {}


def hold(entry: Path) -> None:
    """Keep an entry from being removed as long as this process lives."""
    with contextlib.suppress(OSError):  # a cache that cannot be written is not cleaned either
        os.utime(entry)
        if entry not in _held:
            lock = _lock_of(entry).open("w")
            fcntl.flock(lock, fcntl.LOCK_SH)
            _held[entry] = lock


def used(entry: Path) -> None:
    """Note that an entry is used now, in a file beside it: its own times tell whether its content has changed."""
    with contextlib.suppress(OSError):
        _note_of(entry).touch()


def make_room(root: Path, entries: Iterable[Path], limit: int | None = None) -> None:
    """Remove entries until they have at most `limit` bytes, by default SHARE of the disk of `root`."""
    _sweep(root)
    if limit is None:
        limit = int(shutil.disk_usage(root).total * SHARE)
    found = [(last_used(entry), entry, _bytes(entry)) for entry in entries if entry.exists()]
    total = sum(size for _, _, size in found)
    for at, entry, size in sorted(found):
        if total <= limit:
            return
        if time.time() - at > MOMENT and _removed(entry):
            total -= size


def _removed(entry: Path) -> bool:
    try:
        with _lock_of(entry).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            away = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
            entry.rename(away)
            _delete(away)
            _delete(_note_of(entry))
    except OSError:  # held, or another process was faster
        return False
    return True


def _sweep(root: Path) -> None:
    for pattern in (".*.tmp", "*/.*.tmp"):
        for left in root.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED:
                    _delete(left)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _bytes(entry: Path) -> int:
    if not entry.is_dir():
        return entry.stat().st_size
    return sum(file.lstat().st_size for file in entry.rglob("*") if file.is_file())


def last_used(entry: Path) -> float:
    """Time of its last use, or of its making."""
    times = [0.0]
    for path in (entry, _note_of(entry)):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def _note_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.used")


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")
