"""Copies of files and folders between the storage and this machine, and the cache of what its processes have made."""

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TextIO

from pyarrow import fs

from olora_ray.common import storage

CHUNK = 32 * 2**20
"""Bytes of one request for a part of a large file."""

# Copies between the storage and this machine: of files, and of folders with all in them.


def local_copy(place: str, cache: str | Path) -> Path:
    """A local path of a file or folder: itself when local, else downloaded once into the folder `cache`.

    Raises FileNotFoundError if it is not there, and OSError if it cannot be fetched as a whole.
    """
    if (path := storage.local_path(place)) is not None:
        return path
    target = Path(cache) / PurePosixPath(place.partition("://")[2]).name
    return cached(target, lambda partial: storage.ask(place, lambda system, path: _download(system, path, partial)))


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
    with ThreadPoolExecutor(4) as pool:
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


# The cache: files and folders of this node under names that say all that they depend on, within a part of the disk.


CACHE = os.path.expanduser("~/.cache/olora_ray")
"""Folder of a node for models that do not lie on a shared storage, and for results."""
SHARE = 0.25
"""Part of its disk that a cache may fill."""
_held: dict[Path, TextIO] = {}


def cached(entry: Path, make: Callable[[Path], object]) -> Path:
    """The file or folder `entry`, for which `make` writes a partial one if it is not there.

    Of several processes one makes it, and the others wait. Raises what `make` raises.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as alone:
        if not entry.exists():
            with contextlib.suppress(OSError):  # without flock each of them makes it, and the first one's stays
                alone.enter_context(storage.flocked(_beside(entry, "lock")))
        if not entry.exists():
            with storage.staged(entry) as partial:
                make(partial)
    used(entry)
    return entry


def hold(entry: Path) -> None:
    """Keep an entry from being removed as long as this process lives."""
    with contextlib.suppress(OSError):  # a cache that cannot be written is not cleaned either
        used(entry)
        if entry not in _held:
            lock = _beside(entry, "lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_SH)
            _held[entry] = lock


def used(entry: Path) -> None:
    """Note that an entry is used now, in a file beside it: its own times tell whether its content has changed."""
    with contextlib.suppress(OSError):
        _beside(entry, "used").touch()


def last_used(entry: Path) -> float:
    """Time of its last use, or of its making."""
    times = [0.0]
    for path in (entry, _beside(entry, "used")):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def make_room(root: Path, entries: Iterable[Path], limit: int | None = None) -> None:
    """Remove entries until they have at most `limit` bytes, by default SHARE of the disk of `root`.

    The least recently used entries go first. An entry that was used in the last ten minutes stays: a process may be
    about to open it.
    """
    for left in (*root.glob(".*.tmp"), *root.glob("*/.*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:  # a killed process has left it half-written
                storage.remove_local(left)
    if limit is None:
        limit = int(shutil.disk_usage(root).total * SHARE)
    found = sorted((last_used(entry), entry, _bytes(entry)) for entry in entries if entry.exists())
    total = sum(size for _, _, size in found)
    for at, entry, size in found:
        if total > limit and time.time() - at > 600 and _removed(entry):
            total -= size


def _removed(entry: Path) -> bool:
    try:
        with _beside(entry, "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry.rename(away := storage.beside(entry))
            storage.remove_local(away)
            storage.remove_local(_beside(entry, "used"))
    except OSError:  # held, or another process was faster
        return False
    return True


def _bytes(entry: Path) -> int:
    return sum(file.lstat().st_size for file in (entry, *entry.rglob("*")) if file.is_file())


def _beside(entry: Path, what: str) -> Path:
    return entry.with_name(f".{entry.name}.{what}")


# Results of checks that follow from their inputs alone, kept as texts: the next start need not find them again.


LIBRARIES = ("torch", "transformers", "peft", "safetensors", "flash-attn", "kernels", "bitsandbytes")
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
    """Keep a result; where nothing can be written it is found anew each time.

    Results beside it of more than 90 days are removed: most are of another version, and nobody asks for them.
    """
    with contextlib.suppress(OSError):
        storage.write_text(place, result)
        for file in Path(place).parent.iterdir():
            if time.time() - file.stat().st_mtime > 90 * 24 * 3600:
                file.unlink()


@cache
def code() -> str:
    """Digest of what computes here: this project's code, and the versions of Python and the libraries."""
    found = [platform.python_version(), platform.machine(), project()]
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{library} {version(library)}")
    return storage.digest(*found)


@cache
def project(package: Path = PACKAGE) -> str:
    """Digest of this project's code alone; of another copy of it, if `package` is the folder of one."""
    files = sorted(package.rglob("*.py"))
    lines = (f"{file.relative_to(package).as_posix()}:{storage.digest_file(file)}" for file in files)
    return storage.digest(*lines, length=12)
