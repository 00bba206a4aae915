"""Files by path or URI: local folders and s3:// or gs:// through pyarrow, with the same functions.

A write is atomic: a reader sees the old file, the new file or none, never half of one.
"""

import contextlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

CACHE = os.path.expanduser("~/.cache/olora_ray")
"""Folder of a node for models that do not lie on a shared storage."""
_UMASK = os.umask(0o077)  # it can be read by setting it only: once, before there are threads
os.umask(_UMASK)


def is_uri(place: str) -> bool:
    """Whether `place` is a URI such as s3://bucket/key rather than a path."""
    return "://" in place


def join(place: str, *parts: str) -> str:
    """`place` with parts below it; works for paths and URIs."""
    return "/".join([place.rstrip("/"), *parts])


def filesystem(place: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of a path or URI, and the path inside it."""
    if is_uri(place):
        system, path = fs.FileSystem.from_uri(place)
        return system, path
    return fs.LocalFileSystem(), os.path.abspath(place)


def exists(place: str) -> bool:
    """Whether there is a file or folder."""
    system, path = filesystem(place)
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def names(place: str) -> list[str]:
    """Sorted names of what lies directly in a folder; empty if there is no such folder."""
    system, path = filesystem(place)
    infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def read_bytes(place: str) -> bytes:
    """The file's bytes; raises FileNotFoundError."""
    system, path = filesystem(place)
    with system.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


def write_bytes(place: str, content: bytes) -> None:
    """Write a file atomically; makes the folder."""
    system, path = filesystem(place)
    if is_uri(place) and not place.startswith("file://"):
        with system.open_output_stream(path, compression=None) as stream:
            stream.write(content)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = beside(Path(path))
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def beside(target: Path) -> Path:
    """An unused name in the same folder, hidden, for what is to become `target` or was it; ends in .tmp."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A name beside `target` for the block to write a file or folder at, which becomes `target` in one step.

    Whatever the block has written is removed if it fails, and if another process has made `target` meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(target)
    try:
        yield partial
        try:
            os.replace(partial, target)
        except OSError:  # a folder with files is not replaced: another process was faster
            if not target.exists():
                raise
    finally:
        with contextlib.suppress(OSError):
            remove(str(partial))


def flush_to_disk(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's list of names: a power cut does not undo it then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(place: str, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(place, text.encode())


def read_text(place: str) -> str:
    """The file as UTF-8 text; raises FileNotFoundError."""
    return read_bytes(place).decode()


def open_up(path: Path) -> None:
    """Give a file or folder the mode that new ones get: safetensors makes files that only their owner can read."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)


def private_folder(name: str) -> Path:
    """A folder of this user in the temporary folder, made if needed, in which nobody else can write.

    Raises PermissionError if somebody else has made a folder or a link of that name.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's own folder; delete it, or set TMPDIR to another place")
    return folder


def local_copy(place: str, cache: str | None = None) -> Path:
    """A local path of a file or folder: itself when local, else downloaded once into `cache`."""
    system, path = filesystem(place)
    if isinstance(system, fs.LocalFileSystem):
        return Path(path)
    root = Path(cache or tempfile.mkdtemp(prefix="olora-"))
    target = root / path.rstrip("/").rsplit("/", 1)[-1]
    assert target.name not in ("", ".."), place  # see Place in config/schema.py
    if not target.exists():
        with staged(target) as partial:
            fs.copy_files(path, str(partial), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
    return target


def upload(folder: Path, place: str, last: str | None = None) -> None:
    """Copy a local folder to `place`, the file `last` after all others; no-op if it is that folder."""
    system, path = filesystem(place)
    if isinstance(system, fs.LocalFileSystem) and Path(path) == folder.resolve():
        return
    system.create_dir(path, recursive=True)
    local = fs.LocalFileSystem()
    if last is None:
        fs.copy_files(str(folder), path, source_filesystem=local, destination_filesystem=system)
        return
    for name in sorted((item.name for item in folder.iterdir()), key=lambda name: name == last):
        fs.copy_files(str(folder / name), f"{path}/{name}", source_filesystem=local, destination_filesystem=system)


def remove(place: str) -> None:
    """Delete a file or folder if it is there."""
    system, path = filesystem(place)
    kind = system.get_file_info(path).type
    if kind == fs.FileType.Directory:
        if isinstance(system, fs.LocalFileSystem):
            shutil.rmtree(path)
        else:
            system.delete_dir(path)
    elif kind == fs.FileType.File:
        system.delete_file(path)


@contextlib.contextmanager
def local_folder(place: str) -> Iterator[Path]:
    """A local folder to write; uploaded afterwards if the storage is elsewhere."""
    if not is_uri(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="olora-export-") as temporary:
        folder = Path(temporary) / place.rsplit("/", 1)[-1]
        yield folder
        upload(folder, place)
