"""Files by path or URI: local folders, s3:// and gs:// with the same functions.

A write is atomic: a reader sees the old file, the new file or none, never half of one. Failures are OSErrors; an
object store that has answered before is asked again for a while first (patience.py).
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pyarrow import fs

from olora_ray.common import connections, s3
from olora_ray.common.errors import TryAgain, UserError, short_reason
from olora_ray.common.patience import passes, patiently

Found = TypeVar("Found")

CACHE = os.path.expanduser("~/.cache/olora_ray")
"""Folder of a node for models that do not lie on a shared storage."""
CHUNK = 32 * 2**20
"""Bytes of one request for a part of a large file."""
AT_ONCE = 4
"""Files that are uploaded at the same time."""
_UMASK = os.umask(0o077)  # it can be read by setting it only: once, before there are threads
os.umask(_UMASK)


def is_uri(place: str) -> bool:
    """Whether `place` is a URI such as s3://bucket/key rather than a path."""
    return "://" in place


def join(place: str, *parts: str) -> str:
    """`place` with parts below it; works for paths and URIs.

    Raises UserError for a URI with a query: nothing can be below it.
    """
    if is_uri(place) and "?" in place:
        address, _, query = place.partition("?")
        raise UserError(f"{address}: write it without '?{query}'; {WITHOUT_QUERY}")
    return "/".join([place.rstrip("/"), *parts])


WITHOUT_QUERY = "the server of an object store is named by the variables AWS_ENDPOINT_URL and AWS_REGION, on all nodes"
"""What to do instead of writing options in an address."""


def filesystem(place: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of a path or URI, one for all of a store, and the path inside it.

    The key of an object is taken as it is written: no %20 for blanks.
    """
    if not is_uri(place):
        return fs.LocalFileSystem(), os.path.abspath(place)
    if place.startswith("file://"):
        system, path = fs.FileSystem.from_uri(place)
        return system, path
    scheme, _, rest = place.partition("://")
    address, _, query = rest.partition("?")
    bucket, _, key = address.partition("/")
    system, root = connections.connect(scheme, bucket, query)
    return system, f"{root}/{key}".rstrip("/")


def local_path(place: str) -> Path | None:
    """The local path of a path or file:// URI; None for what lies elsewhere."""
    if is_uri(place) and not place.startswith("file://"):
        return None
    return Path(filesystem(place)[1])


def _ask(place: str, request: Callable[[fs.FileSystem, str], Found]) -> Found:
    """What `request(filesystem, path)` returns, with patience where an object store is asked."""
    if local_path(place) is not None:
        return request(*filesystem(place))
    return patiently("/".join(place.split("/")[:3]), lambda: request(*filesystem(place)))


def check(place: str, field: str) -> None:
    """Write, read and delete a small file below `place`, before anything is done that takes long.

    Raises UserError that starts with `field`, the setting that names the place, and says what to mend; TryAgain for
    an object store that does not answer now. Leaves nothing behind.
    """
    if s3.is_s3(place):
        s3.check(place, field)
    probe = join(place, f".probe-{uuid.uuid4().hex}")
    try:
        write_text(probe, place)
        found = read_text(probe)
        remove(probe)
    except (OSError, ValueError) as error:
        kind = TryAgain if passes(error) else UserError
        raise kind(f"{field}: {place} cannot be written: {short_reason(error)}") from None
    if found != place:
        raise UserError(f"{field}: {place} gives something else than was written")


def exists(place: str) -> bool:
    """Whether there is a file or folder."""
    return _ask(place, lambda system, path: bool(system.get_file_info(path).type != fs.FileType.NotFound))


def size(place: str) -> int | None:
    """Bytes of a file; None if it is not there."""

    def look(system: fs.FileSystem, path: str) -> int | None:
        info = system.get_file_info(path)
        return int(info.size) if info.is_file else None

    return _ask(place, look)


def names(place: str) -> list[str]:
    """Sorted names of what lies directly in a folder; empty if there is no such folder."""
    return sorted(info.base_name for info in _infos(place))


def files_below(place: str) -> dict[str, int]:
    """Bytes of each file at any depth below a folder, by its path there; empty if there is no such folder."""
    root = filesystem(place)[1]
    return {info.path[len(root) :].lstrip("/"): info.size for info in _infos(place, recursive=True) if info.is_file}


def version(place: str) -> str:
    """Names what lies at a place now: sizes and times of a file, or of all files below a folder.

    Raises FileNotFoundError if there is nothing.
    """
    root = filesystem(place)[1]
    infos = [_ask(place, lambda system, path: system.get_file_info(path))]
    if not infos[0].is_file:
        infos = _infos(place, recursive=True)
    found = sorted((info.path[len(root) :], info.size, info.mtime_ns or 0) for info in infos if info.is_file)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", place)
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _infos(place: str, recursive: bool = False) -> list[fs.FileInfo]:
    return _ask(
        place,
        lambda system, path: list(
            system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        ),
    )


def read_bytes(place: str) -> bytes:
    """The file's bytes; raises FileNotFoundError."""

    def read(system: fs.FileSystem, path: str) -> bytes:
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    return _ask(place, read)


def write_bytes(place: str, content: bytes) -> None:
    """Write a file atomically; makes the folder. A small file is one request to an object store."""

    def write(system: fs.FileSystem, path: str) -> None:
        with system.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    if (path := local_path(place)) is None:
        _ask(place, write)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
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


def local_copy(place: str, cache: str | Path) -> Path:
    """A local path of a file or folder: itself when local, else downloaded once into the folder `cache`.

    Raises FileNotFoundError if it is not there, and OSError if it cannot be fetched as a whole.
    """
    if (path := local_path(place)) is not None:
        return path
    target = Path(cache) / PurePosixPath(place.partition("://")[2]).name
    if not target.exists():
        with staged(target) as partial:
            _ask(place, lambda system, path: _download(system, path, partial))
    return target


@contextlib.contextmanager
def fetched(place: str) -> Iterator[Path]:
    """A local path of a file or folder for the block: itself when local, else a copy that is removed afterwards."""
    if (path := local_path(place)) is not None:
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
    if (path := local_path(place)) is not None:
        if path == folder.resolve():
            return
        path.mkdir(parents=True, exist_ok=True)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda name: _send(folder / name, join(place, name)), [n for n in files if n != last]):
            pass
    if last in files:
        _send(folder / last, join(place, last))


def _send(file: Path, place: str) -> None:
    if (target := local_path(place)) is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    local = fs.LocalFileSystem()

    def send(system: fs.FileSystem, path: str) -> None:
        fs.copy_files(str(file), path, source_filesystem=local, destination_filesystem=system, chunk_size=CHUNK)

    _ask(place, send)


def remove(place: str) -> None:
    """Delete a file or folder if it is there."""
    if (path := local_path(place)) is not None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    _ask(place, _remove)


def _remove(system: fs.FileSystem, path: str) -> None:
    kind = system.get_file_info(path).type
    if kind == fs.FileType.Directory:
        system.delete_dir(path)
    elif kind == fs.FileType.File:
        system.delete_file(path)


@contextlib.contextmanager
def local_folder(place: str) -> Iterator[Path]:
    """A local folder to write; uploaded afterwards if the storage is elsewhere."""
    if (path := local_path(place)) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="olora-export-") as temporary:
        folder = Path(temporary) / PurePosixPath(place).name
        yield folder
        upload(folder, place)
