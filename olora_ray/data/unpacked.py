"""Copies of large compressed files, uncompressed: made once on a node, instead of a pass up to each unit.

Without one a file is decompressed about half as often as it has units, which grows with the square of its size. Copies
lie in the temporary folder and may fill a part of its disk; a file that finds no room there is read as before. Who
reads a unit compares its CRC-32 anyway, so a copy is never trusted.
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from olora_ray.common import local_files, node_cache
from olora_ray.common.digests import digest
from olora_ray.data.sources import File

WORTH_IT = 256 * 2**20
"""Bytes before a unit from which on a copy is made: tokenising takes several hundred times as long as decompressing."""
LEFT_BEHIND = 6 * 3600.0
"""Seconds after which a copy that nobody uses makes room for others. Until then it stays: making and removing them in
turns would be slower than to have none."""
CHUNK = 8 * 2**20


def find(file: File) -> Path | None:
    """The copy of a file, if there is one."""
    with contextlib.suppress(OSError):
        path = _place(file)
        if path.exists():
            node_cache.used(path)
            return path
    return None


def make(file: File, stream: Any) -> Path | None:
    """Write the copy of a file from the stream of its content; None where it finds no room.

    Of several processes one writes it, and the others wait for that. Raises what reading the stream raises.
    """
    try:
        path = _place(file)
        path.parent.mkdir(exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError:
        return None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        return path if _write(path, iter(lambda: stream.read(CHUNK), b"")) else None


def drop(file: File) -> None:
    """Remove a copy that is damaged, or of other content."""
    with contextlib.suppress(OSError):
        _place(file).unlink(missing_ok=True)


def _place(file: File) -> Path:
    name = digest(file.uri, file.size, file.modified, length=32)
    return local_files.private_folder("olora_ray") / "unpacked" / f"{name}.raw"


class _Room:
    """The room for copies on a disk, of which several files may take at the same time."""

    def __init__(self, folder: Path) -> None:
        """Removes those that were left behind."""
        self._folder = folder
        found = list(folder.glob("*.raw"))
        old = [each for each in found if time.time() - node_cache.last_used(each) > LEFT_BEHIND]
        node_cache.make_room(folder, old, limit=0)
        self._kept_free = shutil.disk_usage(folder).free // 2

    def left(self) -> int:
        """Bytes that may still be written: by all together at most a part of the disk, and half of what was free."""
        disk = shutil.disk_usage(self._folder)
        used = sum(map(_size, [*self._folder.glob("*.raw"), *self._folder.glob(".*.raw.*.tmp")]))
        return min(int(disk.total * node_cache.SHARE) - used, disk.free - self._kept_free)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed, or complete and renamed by now
        return 0


def _has_taken(copy: BinaryIO, chunk: bytes) -> bool:
    """Whether a copy took a chunk: a disk without room, or a quota, takes a part of it, or fails."""
    try:
        return copy.write(chunk) == len(chunk)
    except OSError:
        return False


def _write(path: Path, chunks: Iterable[bytes]) -> bool:
    """Whether the chunks had room; a file that had none is remembered by an empty one beside it."""
    full = path.with_suffix(".full")
    if full.exists() and time.time() - full.stat().st_mtime < LEFT_BEHIND:
        return False
    room = _Room(path.parent)
    try:
        with local_files.staged(path) as partial, partial.open("wb", buffering=0) as copy:
            for chunk in chunks:
                if len(chunk) > room.left() or not _has_taken(copy, chunk):
                    raise _NoRoomError
    except _NoRoomError:
        with contextlib.suppress(OSError):
            full.touch()
        return False
    return True


class _NoRoomError(Exception):
    """A copy is larger than the room for it."""
