"""Files by path or URI: the same functions for local folders, s3:// and gs://. A `location` is a path or a URI.

A write is atomic: a reader sees the old file, the new file or no file, never a part of one. Failures are OSErrors. A
request to an object store that has answered before is first retried for a while (retry.py).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pyarrow import fs

from olora_ray.common import retry, s3
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.retry import transient, with_retries

# Local files and folders: created in one step, flushed to disk, with the user's file modes, or private.


NOT_OF_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of fsync on a file system that cannot flush folders."""
# The system tells the umask only to a process that sets it. That affects all threads, so it is done once, at import.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def remove_local(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def beside(target: Path) -> Path:
    """Return an unused hidden name in the folder of `target`, ending in .tmp, for its partial or discarded content."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a path at which the block writes a file or folder, which then becomes `target` in one step.

    The partial content is removed if the block fails, or if another process has created `target` meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(target)
    try:
        yield partial
        try:
            os.replace(partial, target)
        except OSError:
            # The system does not replace a folder that has files: another process was faster.
            if not target.exists():
                raise
    finally:
        with contextlib.suppress(OSError):
            remove_local(partial)


@contextlib.contextmanager
def flocked(path: Path) -> Iterator[None]:
    """Hold flock on a file, which is created if needed, for the block. Waits for other holders.

    The system releases the lock of a process that dies.
    """
    # Not filelock: on a file system without flock, some of its versions wait for ever, or use no lock.
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk and survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder. The files in it are written all the same.
        if error.errno not in NOT_OF_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def open_up(path: Path) -> None:
    """Give a file or folder the mode of new ones: safetensors creates files that only their owner can read."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)


def private_folder(name: str) -> Path:
    """Return a folder in the temporary folder in which only this user can write; create it if needed.

    Raises PermissionError if another user has created a folder or a link with that name.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"{folder} is not this user's own folder; delete it, or set TMPDIR to another folder"
        )
    return folder


Answer = TypeVar("Answer")
CHUNK = 8 * 2**20
"""Bytes per read of a large file."""
PART = 64 * 2**10
"""Bytes that `check` reads from the middle of a file."""
_WITHOUT_FOLDERS = ("gs://", "gcs://")
"""Stores where pyarrow lists the objects in a folder, but only those folders in it that it has created itself."""


def is_uri(location: str) -> bool:
    return "://" in location


def join(location: str, *parts: str) -> str:
    """Return a path or URI with parts appended. Raises UserError for a URI with a query."""
    if is_uri(location) and "?" in location:
        address, _, query = location.partition("?")
        raise UserError(f"{address}: write it without '?{query}'; {WITHOUT_QUERY}")
    return "/".join([location.rstrip("/"), *parts])


WITHOUT_QUERY = (
    "name the server with the environment variables AWS_ENDPOINT_URL and AWS_REGION, on all nodes"
)


def filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a path or URI, and the path in it. All locations of a store share a filesystem.

    The key of an object is used as it is written, no %20 for blanks; only in a file:// URI %20 is a blank.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), os.path.abspath(location)
    scheme, _, rest = location.partition("://")
    address, _, query = rest.partition("?")
    bucket, _, key = address.partition("/")
    system, root = retry.connect(scheme, bucket, query)
    if scheme == "file":
        key = unquote(key)
    return system, f"{root}/{key}".rstrip("/")


def local_path(location: str) -> Path | None:
    """Return the local path of a path or file:// URI; None for any other URI."""
    if is_uri(location) and not location.startswith("file://"):
        return None
    return Path(filesystem(location)[1])


def ask(location: str, request: Callable[[fs.FileSystem, str], Answer]) -> Answer:
    """Return the answer of `request(filesystem, path)`. A request to an object store is retried (`with_retries`)."""
    if local_path(location) is not None:
        return request(*filesystem(location))
    return with_retries("/".join(location.split("/")[:3]), lambda: request(*filesystem(location)))


def check_storage(location: str, field: str) -> None:
    """Write, read and delete a small file below `location`, so that a wrong storage fails before any long work.

    Raises a UserError that starts with `field`, the setting of the location, and says what to do; TryAgain if an object
    store does not answer. Leaves no file.
    """
    if s3.is_s3(location):
        s3.check_bucket(location, field)
    probe = join(location, f".probe-{uuid.uuid4().hex}")
    content = os.urandom(4 * PART)
    subject = f"{field}: {location}"

    def read_part(system: fs.FileSystem, path: str) -> bytes:
        with system.open_input_file(path) as file:
            file.seek(PART)
            return bytes(file.read(PART))

    with as_user_error(
        f"{subject} cannot be written", OSError, ValueError, reason=short_reason, passes=transient
    ):
        write_bytes(probe, content)
        part = ask(probe, read_part)
        remove(probe)
    if part != content[PART : 2 * PART]:
        raise UserError(
            f"{subject}: the object store returns wrong bytes for a part of a file (HTTP ranges), so shards and weights"
            " would be wrong; use another object store, or another version of its software"
        )


def info(location: str) -> fs.FileInfo:
    return ask(location, lambda system, path: system.get_file_info(path))


def exists(location: str) -> bool:
    return bool(info(location).type != fs.FileType.NotFound)


def size(location: str) -> int | None:
    found = info(location)
    if not found.is_file:
        return None
    return int(found.size)


def names(location: str) -> list[str]:
    """Return the sorted names of the files and folders in a folder; empty if the folder does not exist."""
    if location.startswith(_WITHOUT_FOLDERS):
        return sorted({path.partition("/")[0] for path in files_below(location)})
    return sorted(each.base_name for each in _infos(location))


def times(location: str) -> dict[str, float]:
    """Return name -> last change of each entry in a folder, in seconds since 1970; 0 if the store does not tell it."""
    return {each.base_name: (each.mtime_ns or 0) / 1e9 for each in _infos(location)}


def files_below(location: str) -> dict[str, int]:
    """Return path -> bytes of all files below a folder, at any depth; empty if the folder does not exist."""
    root = filesystem(location)[1]
    return {
        each.path[len(root) :].lstrip("/"): each.size
        for each in _infos(location, recursive=True)
        if each.is_file
    }


def usage(location: str) -> tuple[dict[str, int], float]:
    """Return path -> bytes of all files below a folder, and their last change in seconds since 1970.

    The last change is now if there are no files.
    """
    times = [each.mtime_ns or 0 for each in _infos(location, recursive=True) if each.is_file]
    return files_below(location), max(times, default=time.time_ns()) / 1e9


def version(location: str) -> str:
    """Return a digest of the size and time of a file, or of all files below a folder; it changes when they do.

    Raises FileNotFoundError if the location does not exist.
    """
    root = filesystem(location)[1]
    infos = [info(location)]
    if not infos[0].is_file:
        infos = _infos(location, recursive=True)
    files = sorted(
        (each.path[len(root) :], each.size, each.mtime_ns or 0) for each in infos if each.is_file
    )
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", location)
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _infos(location: str, recursive: bool = False) -> list[fs.FileInfo]:
    return ask(
        location,
        lambda system, path: list(
            system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        ),
    )


def read_bytes(location: str) -> bytes:
    def read(system: fs.FileSystem, path: str) -> bytes:
        with system.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    return ask(location, read)


def digest_of(location: str) -> str:
    def read(system: fs.FileSystem, path: str) -> str:
        sha = hashlib.sha256()
        with system.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(CHUNK):
                sha.update(chunk)
        return sha.hexdigest()

    return ask(location, read)


def write_bytes(location: str, content: bytes, durable: bool = True) -> None:
    """Write a file atomically, and create its folder. A small file is one request to an object store.

    A file that is not `durable` may be lost or cut by a power failure. Use that for sealed files that can be rebuilt.
    """
    write_chunks(location, lambda: (content,), durable)


def write_chunks(
    location: str, content: Callable[[], Iterable[bytes]], durable: bool = True
) -> None:
    """Write a file that is too large for memory, like `write_bytes`. Each call of `content` yields all of it."""

    def write(system: fs.FileSystem, path: str) -> None:
        with system.open_output_stream(path, compression=None) as stream:
            for chunk in content():
                stream.write(chunk)

    path = local_path(location)
    if path is None:
        ask(location, write)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            for chunk in content():
                file.write(chunk)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # The error of a full disk names no file, and other errors name the temporary one, which no user knows.
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_text(location: str, text: str, durable: bool = True) -> None:
    write_bytes(location, text.encode(), durable)


def read_text(location: str) -> str:
    return read_bytes(location).decode()


def remove(location: str) -> None:
    def delete(system: fs.FileSystem, path: str) -> None:
        file_type = system.get_file_info(path).type
        if file_type == fs.FileType.Directory:
            # On gs:// pyarrow then deletes the object that stands for the folder, which exists only if it was created.
            with contextlib.suppress(FileNotFoundError):
                system.delete_dir(path)
        elif file_type == fs.FileType.File:
            system.delete_file(path)

    path = local_path(location)
    if path is None:
        ask(location, delete)
    else:
        remove_local(path)


# SHA-256 digests in hex. They name token stores, caches and runs, so the text that is hashed must never change: an
# existing run would not find its own files any more.


WHOLE = 64
"""Hex digits of a complete digest."""


def digest(*parts: object, length: int = WHOLE) -> str:
    return digest_bytes(" ".join(map(str, parts)).encode())[:length]


def digest_json(value: object, length: int = WHOLE) -> str:
    return digest(json.dumps(value, sort_keys=True), length=length)


def digest_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_and_digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": digest_file(file)}
