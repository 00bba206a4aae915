"""Files by path or URI: local folders, s3:// and gs:// with the same functions.

A write is atomic: a reader sees the old file, the new file or none, never half of one. Failures are OSErrors; an
object store that has answered before is asked again for a while first.
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
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from olora_ray.common import patience, s3
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.patience import passes, patiently

# Files and folders of this machine: made in one step, flushed, with the modes that the user has set, or private.


NOT_OF_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of fsync on a file system that cannot flush folders."""
_UMASK = os.umask(0o077)  # it can be read by setting it only: once, before there are threads
os.umask(_UMASK)


def remove_local(path: Path) -> None:
    """Delete a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
            remove_local(partial)


@contextlib.contextmanager
def flocked(path: Path) -> Iterator[None]:
    """Hold flock on a file, which is made, for the block; wait for it. Processes that die let it go.

    Not filelock: on some of its versions a file system without flock makes it wait for ever, or use no lock.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flush_to_disk(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's list of names: a power cut does not undo it then.

    Not every file system can be asked for that of a folder; what was done there is no failure.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OF_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


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


Found = TypeVar("Found")
CHUNK = 8 * 2**20
"""Bytes of a large file that are read at once."""
PART = 64 * 2**10
"""Bytes of a file that `check` reads from its middle."""
_WITHOUT_FOLDERS = ("gs://", "gcs://")
"""Stores of which pyarrow lists the objects in a folder, but not the folders in it unless it has made them itself."""


def is_uri(place: str) -> bool:
    """True if `place` is a URI such as s3://bucket/key rather than a path."""
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
"""The remedy for options in an address."""


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
    system, root = patience.connect(scheme, bucket, query)
    return system, f"{root}/{key}".rstrip("/")


def local_path(place: str) -> Path | None:
    """The local path of a path or file:// URI; None for what lies elsewhere."""
    if is_uri(place) and not place.startswith("file://"):
        return None
    return Path(filesystem(place)[1])


def ask(place: str, request: Callable[[fs.FileSystem, str], Found]) -> Found:
    """Return what `request(filesystem, path)` returns, with patience where an object store is asked."""
    if local_path(place) is not None:
        return request(*filesystem(place))
    return patiently("/".join(place.split("/")[:3]), lambda: request(*filesystem(place)))


def check(place: str, field: str) -> None:
    """Write, read and delete a file below `place`, before anything is done that takes long.

    Raises UserError that starts with `field`, the setting that names the place, and says what to mend; TryAgain for
    an object store that does not answer now. Leaves nothing behind.
    """
    if s3.is_s3(place):
        s3.check(place, field)
    probe = join(place, f".probe-{uuid.uuid4().hex}")
    content = os.urandom(4 * PART)
    with as_user_error(f"{field}: {place} cannot be written", OSError, ValueError, reason=short_reason, passes=passes):
        write_bytes(probe, content)
        whole, part = read_bytes(probe), ask(probe, _part)
        remove(probe)
    if whole != content:
        raise UserError(f"{field}: {place} gives something else than was written")
    if part != content[PART : 2 * PART]:
        raise UserError(
            f"{field}: {place}: the store answers a read of a part of a file with other bytes (HTTP ranges): shards and"
            " weights would be read wrongly; use another store, or another version of it"
        )


def _part(system: fs.FileSystem, path: str) -> bytes:
    with system.open_input_file(path) as file:
        file.seek(PART)
        return bytes(file.read(PART))


def exists(place: str) -> bool:
    """True if there is a file or folder."""
    return ask(place, lambda system, path: bool(system.get_file_info(path).type != fs.FileType.NotFound))


def size(place: str) -> int | None:
    """Bytes of a file; None if it is not there."""

    def look(system: fs.FileSystem, path: str) -> int | None:
        info = system.get_file_info(path)
        return int(info.size) if info.is_file else None

    return ask(place, look)


def names(place: str) -> list[str]:
    """Sorted names of what lies directly in a folder; empty if there is no such folder."""
    if place.startswith(_WITHOUT_FOLDERS):
        return sorted({path.partition("/")[0] for path in files_below(place)})
    return sorted(info.base_name for info in _infos(place))


def times(place: str) -> dict[str, float]:
    """When each thing directly in a folder was changed last, in seconds since 1970, by its name; 0 if not known."""
    return {info.base_name: (info.mtime_ns or 0) / 1e9 for info in _infos(place)}


def files_below(place: str) -> dict[str, int]:
    """Bytes of each file at any depth below a folder, by its path there; empty if there is no such folder."""
    root = filesystem(place)[1]
    return {info.path[len(root) :].lstrip("/"): info.size for info in _infos(place, recursive=True) if info.is_file}


def version(place: str) -> str:
    """Names what lies at a place now: sizes and times of a file, or of all files below a folder.

    Raises FileNotFoundError if there is nothing.
    """
    root = filesystem(place)[1]
    infos = [ask(place, lambda system, path: system.get_file_info(path))]
    if not infos[0].is_file:
        infos = _infos(place, recursive=True)
    found = sorted((info.path[len(root) :], info.size, info.mtime_ns or 0) for info in infos if info.is_file)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", place)
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _infos(place: str, recursive: bool = False) -> list[fs.FileInfo]:
    return ask(
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

    return ask(place, read)


def digest_of(place: str) -> str:
    """SHA-256 of a file of any size; raises FileNotFoundError."""

    def read(system: fs.FileSystem, path: str) -> str:
        found = hashlib.sha256()
        with system.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(CHUNK):
                found.update(chunk)
        return found.hexdigest()

    return ask(place, read)


def write_bytes(place: str, content: bytes, durable: bool = True) -> None:
    """Write a file atomically; makes the folder. A small file is one request to an object store.

    What is not `durable` may be lost or cut by a power failure: for what is sealed and can be made again.
    """
    write_chunks(place, lambda: (content,), durable)


def write_chunks(place: str, content: Callable[[], Iterable[bytes]], durable: bool = True) -> None:
    """Write a file that is too large to be held, as `write_bytes` does; each call of `content` gives all of it."""

    def write(system: fs.FileSystem, path: str) -> None:
        with system.open_output_stream(path, compression=None) as stream:
            for chunk in content():
                stream.write(chunk)

    if (path := local_path(place)) is None:
        ask(place, write)
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
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not name it, and nobody knows the temporary one
        raise


def write_text(place: str, text: str, durable: bool = True) -> None:
    """Write UTF-8 text atomically; see `write_bytes`."""
    write_bytes(place, text.encode(), durable)


def read_text(place: str) -> str:
    """The file as UTF-8 text; raises FileNotFoundError."""
    return read_bytes(place).decode()


def remove(place: str) -> None:
    """Delete a file or folder if it is there."""
    if (path := local_path(place)) is not None:
        remove_local(path)
        return
    ask(place, _remove)


def abort_uploads(place: str) -> None:
    """End the uploads below `place` that were cut off, where an object store keeps their parts; raises StoreError.

    Only for places where nobody else is writing now.
    """
    if s3.is_s3(place):
        s3.abort_uploads(place)


def _remove(system: fs.FileSystem, path: str) -> None:
    kind = system.get_file_info(path).type
    if kind == fs.FileType.Directory:
        with contextlib.suppress(FileNotFoundError):  # of gs:// the object that stands for a folder: nobody makes it
            system.delete_dir(path)
    elif kind == fs.FileType.File:
        system.delete_file(path)


# SHA-256 digests as hex: they name stores, caches and runs, so the text behind each must never change.


WHOLE = 64
"""Hex digits of a whole digest."""


def digest(*parts: object, length: int = WHOLE) -> str:
    """The first `length` hex digits of the digest of the parts, with a space between them."""
    return digest_bytes(" ".join(map(str, parts)).encode())[:length]


def digest_json(value: object, length: int = WHOLE) -> str:
    """The digest of the value as JSON with sorted keys."""
    return digest(json.dumps(value, sort_keys=True), length=length)


def digest_bytes(content: bytes) -> str:
    """The digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def digest_file(file: Path) -> str:
    """The digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_and_digest(file: Path) -> dict[str, Any]:
    """The entry of a file in a manifest: {bytes, sha256}."""
    return {"bytes": file.stat().st_size, "sha256": digest_file(file)}


# JSON files with a digest of their content, so that a damaged one is noticed.


def seal(tree: dict[str, Any], indent: int | None = None) -> str:
    """The tree as JSON, with the digest of its content in it."""
    return json.dumps({**tree, "seal": digest_json(tree)}, indent=indent)


def unseal(text: str) -> dict[str, Any]:
    """Read `seal` back; raises ValueError if it is not what was written."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("not a JSON object")
    found = tree.pop("seal", None)
    if found != digest_json(tree):
        raise ValueError("not what was written: its seal does not fit")
    return tree


def read_sealed(place: str) -> dict[str, Any] | None:
    """A sealed file; None if it is damaged or not there."""
    try:
        return unseal(read_text(place))
    except (FileNotFoundError, ValueError):
        return None
