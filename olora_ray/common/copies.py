"""Copies between the storage and this machine: of files, and of folders with all in them."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pyarrow import fs

from olora_ray.common import storage
from olora_ray.common.local_files import staged

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
