"""Files and folders of this machine: made in one step, flushed, with the modes that the user has set, or private."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

NOT_OF_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)
"""What fsync says where it is not for folders."""
_UMASK = os.umask(0o077)  # it can be read by setting it only: once, before there are threads
os.umask(_UMASK)


def remove(path: Path) -> None:
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
            remove(partial)


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
