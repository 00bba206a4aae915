"""Copies of files and folders between a storage and this node, and a cache on this node for models and results."""

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

# Copies between a storage and this node.


def local_copy(location: str, cache: str | Path) -> Path:
    """Return a local path of a file or folder. One that is not local is downloaded once into the folder `cache`.

    Raises FileNotFoundError if it does not exist, and OSError if the download fails.
    """
    path = storage.local_path(location)
    if path is not None:
        return path

    def download(partial: Path) -> None:
        storage.ask(location, lambda system, path: _download(system, path, partial))

    return cached(Path(cache) / PurePosixPath(location.partition("://")[2]).name, download)


def kept_copy(location: str, folder: str) -> Path:
    """Return a local path as `local_copy`. The copy stays in this folder of the cache, one for each version."""
    # What lies at an address may be replaced.
    key = storage.digest(location, storage.version(location), length=16)
    return local_copy(location, Path(CACHE, folder, key))


@contextlib.contextmanager
def fetched(location: str) -> Iterator[Path]:
    """Yield a local path of a file or folder. One that is not local is copied, and the copy is removed afterwards."""
    path = storage.local_path(location)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="olora-") as temporary:
        yield local_copy(location, temporary)


def _download(system: fs.FileSystem, path: str, target: Path) -> None:
    local = fs.LocalFileSystem()
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", path)
    if info.is_file:
        fs.copy_files(
            path,
            str(target),
            source_filesystem=system,
            destination_filesystem=local,
            chunk_size=CHUNK,
        )
        return
    target.mkdir(exist_ok=True)
    for each in system.get_file_info(fs.FileSelector(path, recursive=True)):
        inner = PurePosixPath(each.path[len(path) :].lstrip("/"))
        # The key of an object may have any text, so another user's object could overwrite a file of this user.
        if ".." in inner.parts:
            raise OSError(f"{each.path}: points outside the folder into which it would be copied")
        if each.is_file:
            inner = inner.parent
        (target / inner).mkdir(parents=True, exist_ok=True)
    fs.copy_files(
        path, str(target), source_filesystem=system, destination_filesystem=local, chunk_size=CHUNK
    )


def upload(folder: Path, location: str, last: str | None = None) -> None:
    """Copy a local folder to `location`, the file `last` after all others. Does nothing if they are the same folder."""
    path = storage.local_path(location)
    if path is not None:
        if path == folder.resolve():
            return
        path.mkdir(parents=True, exist_ok=True)
    files = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    others = [name for name in files if name != last]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: _send(folder / name, storage.join(location, name)), others))
    if last in files:
        _send(folder / last, storage.join(location, last))


def _send(file: Path, location: str) -> None:
    target = storage.local_path(location)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    local = fs.LocalFileSystem()

    def send(system: fs.FileSystem, path: str) -> None:
        fs.copy_files(
            str(file),
            path,
            source_filesystem=local,
            destination_filesystem=system,
            chunk_size=CHUNK,
        )

    storage.ask(location, send)


@contextlib.contextmanager
def local_folder(location: str) -> Iterator[Path]:
    """Yield a local folder to write. If `location` is not local, it then gets exactly the content of that folder."""
    path = storage.local_path(location)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="olora-export-") as temporary:
        folder = Path(temporary) / PurePosixPath(location).name
        yield folder
        upload(folder, location)
        # Remove the files of an earlier attempt. If it wrote the weights in several files and this one a single file,
        # a loader would take the wrong ones.
        for name in storage.files_below(location):
            if not (folder / name).is_file():
                storage.remove(storage.join(location, name))


# The cache of this node. The name of an entry depends on everything that decides its content, so an entry never becomes
# outdated. The cache is limited to a part of the disk.


CACHE = os.path.expanduser("~/.cache/olora_ray")
"""Folder of this node for models that are not on a shared storage, and for results."""
SHARE = 0.25
"""Part of its disk that the cache may fill."""
_held: dict[Path, TextIO] = {}


def cached(entry: Path, make: Callable[[Path], object]) -> Path:
    """Return the file or folder `entry`. If it is missing, `make(path)` writes it at a temporary path.

    If several processes need it, one of them calls `make` and the others wait. Raises what `make` raises.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as alone:
        if not entry.exists():
            # Without flock each process calls `make`, and the first result stays.
            with contextlib.suppress(OSError):
                alone.enter_context(storage.flocked(_beside(entry, "lock")))
        if not entry.exists():
            with storage.staged(entry) as partial:
                make(partial)
    used(entry)
    return entry


def hold(entry: Path) -> None:
    # In a cache that cannot be written, nothing is removed either.
    with contextlib.suppress(OSError):
        used(entry)
        if entry not in _held:
            lock = _beside(entry, "lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_SH)
            _held[entry] = lock


def used(entry: Path) -> None:
    # In a file beside the entry: the entry's own time shows whether its content has changed.
    with contextlib.suppress(OSError):
        _beside(entry, "used").touch()


def last_used(entry: Path) -> float:
    times = [0.0]
    for path in (entry, _beside(entry, "used")):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def make_room(root: Path, entries: Iterable[Path] | None = None, limit: int | None = None) -> None:
    """Remove the least recently used entries until `limit` bytes remain, by default SHARE of the disk of `root`.

    `entries` are by default all files and folders of `root`, without hidden ones.

    Entries that were used in the last ten minutes stay, because a process may be about to open them. Entries that a
    process holds (`hold`) stay, too.
    """
    for partial in (*root.glob(".*.tmp"), *root.glob("*/.*.tmp")):
        with contextlib.suppress(OSError):
            # A killed process has left it behind.
            if time.time() - partial.stat().st_mtime > 24 * 3600:
                storage.remove_local(partial)
    if limit is None:
        limit = int(shutil.disk_usage(root).total * SHARE)
    if entries is None:
        entries = root.glob("[!.]*")
    oldest_first = []
    for entry in entries:
        if entry.exists():
            files = (file for file in (entry, *entry.rglob("*")) if file.is_file())
            size = sum(file.lstat().st_size for file in files)
            oldest_first.append((last_used(entry), entry, size))
    oldest_first.sort()
    total = sum(size for _, _, size in oldest_first)
    for at, entry, size in oldest_first:
        if total <= limit or time.time() - at <= 600:
            continue
        # An error means that a process holds it, or that another process was faster.
        with contextlib.suppress(OSError), _beside(entry, "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            away = storage.beside(entry)
            entry.rename(away)
            storage.remove_local(away)
            storage.remove_local(_beside(entry, "used"))
            total -= size


def _beside(entry: Path, suffix: str) -> Path:
    return entry.with_name(f".{entry.name}.{suffix}")


# Results of checks, kept as text files. A result depends only on its inputs, so the next start reuses it.


LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "flash-attn",
    "kernels",
    "bitsandbytes",
)
PACKAGE = Path(__file__).resolve().parents[1]


def result_path(check: str, *inputs: object) -> str:
    """Return the file for the result of a check. It differs for other inputs, another library version or other code."""
    return storage.join(CACHE, check, storage.digest(code(), *inputs, length=32))


def read(location: str) -> str | None:
    try:
        return storage.read_text(location)
    except (OSError, UnicodeDecodeError):
        return None


def keep(location: str, result: str) -> None:
    """Keep a result. Does nothing if the cache cannot be written.

    Removes results in the same folder that are older than 90 days: most of them belong to another version of the code.
    """
    with contextlib.suppress(OSError):
        storage.write_text(location, result)
        for file in Path(location).parent.iterdir():
            if time.time() - file.stat().st_mtime > 90 * 24 * 3600:
                file.unlink()


@cache
def code() -> str:
    parts = [platform.python_version(), platform.machine(), project()]
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{library} {version(library)}")
    return storage.digest(*parts)


@cache
def project(package: Path = PACKAGE) -> str:
    """Return a digest of this project's code alone, in the folder `package`."""
    files = sorted(package.rglob("*.py"))
    lines = (
        f"{file.relative_to(package).as_posix()}:{storage.digest_file(file)}" for file in files
    )
    return storage.digest(*lines, length=12)
