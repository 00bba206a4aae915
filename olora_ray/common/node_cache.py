"""Copies between the storage and this machine: of files, and of folders with all in them."""

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TextIO

from pyarrow import fs

from olora_ray.common import storage
from olora_ray.common.storage import staged

CACHE = os.path.expanduser("~/.cache/olora_ray")
"""Folder of a node for models that do not lie on a shared storage."""
CHUNK = 32 * 2**20
"""Bytes of one request for a part of a large file."""
AT_ONCE = 4
"""Files that are uploaded at the same time."""


def local_copy(place: str, cache: str | Path) -> Path:
    """A local path of a file or folder: itself when local, else downloaded once into the folder `cache`.

    Raises FileNotFoundError if it is not there, and OSError if it cannot be fetched as a whole.
    """
    if (path := storage.local_path(place)) is not None:
        return path
    target = Path(cache) / PurePosixPath(place.partition("://")[2]).name
    if not target.exists():
        with staged(target) as partial:
            storage.ask(place, lambda system, path: _download(system, path, partial))
    return target


@contextlib.contextmanager
def fetched(place: str) -> Iterator[Path]:
    """A local path of a file or folder for the block: itself when local, else a copy that is removed afterwards."""
    if (path := storage.local_path(place)) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="olora-") as temporary:
        yield local_copy(place, temporary)


def _download(system: fs.FileSystem, path: str, target: Path) -> None:
    local = fs.LocalFileSystem()
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", path)
    if info.is_file:
        fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=local, chunk_size=CHUNK)
        return
    target.mkdir(exist_ok=True)
    for each in system.get_file_info(fs.FileSelector(path, recursive=True)):
        inner = PurePosixPath(each.path[len(path) :].lstrip("/"))
        if ".." in inner.parts:  # the key of an object may be anything
            raise OSError(f"{each.path}: leads out of the folder that it is to be copied to")
        (target / (inner.parent if each.is_file else inner)).mkdir(parents=True, exist_ok=True)
    fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=local, chunk_size=CHUNK)


def upload(folder: Path, place: str, last: str | None = None) -> None:
    """Copy a local folder to `place`, the file `last` after all others; no-op if it is that folder."""
    if (path := storage.local_path(place)) is not None:
        if path == folder.resolve():
            return
        path.mkdir(parents=True, exist_ok=True)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    others = [name for name in files if name != last]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: _send(folder / name, storage.join(place, name)), others))
    if last in files:
        _send(folder / last, storage.join(place, last))


def _send(file: Path, place: str) -> None:
    if (target := storage.local_path(place)) is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    local = fs.LocalFileSystem()

    def send(system: fs.FileSystem, path: str) -> None:
        fs.copy_files(str(file), path, source_filesystem=local, destination_filesystem=system, chunk_size=CHUNK)

    storage.ask(place, send)


@contextlib.contextmanager
def local_folder(place: str) -> Iterator[Path]:
    """A local folder to write; uploaded afterwards if the storage is elsewhere, where nothing else is left then."""
    if (path := storage.local_path(place)) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="olora-export-") as temporary:
        folder = Path(temporary) / PurePosixPath(place).name
        yield folder
        upload(folder, place)
        # Files of an earlier attempt: shards of weights beside a single file, and whoever loads takes the wrong ones.
        for name in storage.files_below(place):
            if not (folder / name).is_file():
                storage.remove(storage.join(place, name))


# Bound of what a node keeps of things that lie elsewhere: models and shards that its processes have fetched.


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


# Results of checks that follow from their inputs alone, kept on this node: the next start need not find them again.


LIBRARIES = ("torch", "transformers", "peft", "safetensors", "flash-attn", "kernels")
OLD = 90 * 24 * 3600.0
"""Seconds after which a result is found anew: most are of another version then, and nobody asks for them."""
PACKAGE = Path(__file__).resolve().parents[1]


def place(what: str, *inputs: object) -> str:
    """The file in which a result is kept; another for any other input, library or line of code."""
    return storage.join(CACHE, what, storage.digest(code(), *inputs, length=32))


def read(place: str) -> str | None:
    """A kept result; None if there is none, or it cannot be read."""
    try:
        return storage.read_text(place)
    except (OSError, UnicodeDecodeError):
        return None


def keep(place: str, result: str) -> None:
    """Keep a result; where nothing can be written it is found anew each time. Old ones beside it are removed."""
    with contextlib.suppress(OSError):
        storage.write_text(place, result)
        for file in Path(place).parent.iterdir():
            if time.time() - file.stat().st_mtime > OLD:
                file.unlink()


@cache
def code() -> str:
    """Digest of what computes here: this project's code, and the versions of Python and the libraries."""
    found = [f"{name} {_version(name)}" for name in LIBRARIES]
    files = sorted(PACKAGE.rglob("*.py"))
    return storage.digest(platform.python_version(), platform.machine(), *found, *map(storage.digest_file, files))


@cache
def project(package: Path = PACKAGE) -> str:
    """Digest of this project's code alone; of another copy of it, if `package` is the folder of one."""
    files = sorted(package.rglob("*.py"))
    lines = (f"{file.relative_to(package).as_posix()}:{storage.digest_file(file)}" for file in files)
    return storage.digest(*lines, length=12)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
