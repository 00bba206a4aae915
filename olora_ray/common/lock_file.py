"""The file of a lock on each kind of storage: how it is read, and written only if nobody else was faster.

LocalFile        flock on FILE.guard makes the look and the write one step; the kernel releases it at a crash
ConditionalFile  s3://: the store refuses a write if what lies there is not what was read
SettlingFile     any other store: write, wait as long as a write may take, and see whose name stands there
"""

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from olora_ray.common import s3, storage
from olora_ray.common.errors import TryAgain, UserError

GUARD = ".guard"
WRITE_LIMIT = 15.0
"""Seconds from a look to the end of the write after it, in a store without conditions: who needs longer gives way."""
SETTLE = 20.0
"""Seconds that a writer waits there before its name counts; more than WRITE_LIMIT."""


@dataclass(frozen=True)
class Seen:
    """What a look has found."""

    content: bytes | None
    """None: no file."""
    age: float
    """Seconds since it was written, by the storage's own clock where it has one."""
    version: str | None
    """Names what was seen, for the write after it."""


class LockFile(Protocol):
    """The file of a lock."""

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else looks or writes meanwhile, where that is possible."""

    def read(self) -> Seen:
        """Look; raises OSError."""

    def write(self, content: bytes, seen: Seen) -> bool:
        """Write if nothing has changed since `seen`; False if somebody was faster. Raises OSError."""

    def stands(self, content: bytes) -> bool:
        """Whether what was just written by a new holder counts; may take SETTLE seconds. Raises OSError."""

    def clear(self, seen: Seen) -> None:
        """Give the lock back, if nothing has changed since `seen`. Raises OSError."""


def lock_file(place: str, what: str) -> LockFile:
    """The file at `place`, a path or URI; `what` names the lock in messages."""
    if (path := storage.local_path(place)) is not None:
        return LocalFile(path, what)
    if s3.is_s3(place):
        s3.require_boto3(place, what)
        return ConditionalFile(place)
    return SettlingFile(place)


class LocalFile:
    """On a file system with flock, local or shared."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self.guard = path.with_name(path.name + GUARD)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds flock on the guard; raises UserError where the file system has no such locks."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            raise UserError(f"{self.what}: its lock {self.path} is a folder; remove it")
        with self.guard.open("w") as guard:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOLCK):
                    raise
                raise UserError(
                    f"{self.what}: the file system of {self.path} has no file locks ({error.strerror}); mount it with"
                    " them (Lustre: -o flock), or set run.storage to a place that has them"
                ) from None
            yield

    def read(self) -> Seen:
        """The file; its age is the difference to a file that is touched now, so that no host's clock counts."""
        try:
            content = self.path.read_bytes()
            os.utime(self.guard)
            age = self.guard.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return Seen(None, 0.0, None)
        return Seen(content, age, "there")

    def write(self, content: bytes, seen: Seen) -> bool:
        """Under `exclusive` nothing changes in between."""
        storage.write_bytes(str(self.path), content)
        return True

    def stands(self, content: bytes) -> bool:
        """At once."""
        return True

    def clear(self, seen: Seen) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


class _StoreFile:
    """In an object store, where nobody can be kept from writing."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._looked = 0.0

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to hold."""
        return contextlib.nullcontext()


class ConditionalFile(_StoreFile):
    """In an S3 store; one that ignores conditions is found out, and then treated as SettlingFile does."""

    def read(self) -> Seen:
        """The object; its age is by the store's clock."""
        self._looked = time.monotonic()
        found = s3.get(self.place)
        return Seen(found.content, found.age, found.etag) if found else Seen(None, 0.0, None)

    def write(self, content: bytes, seen: Seen) -> bool:
        """One request."""
        if s3.put_if(self.place, content, seen.version) is not None:
            return True
        # A request that was repeated may have been the first to arrive: then what lies there is this.
        found = s3.get(self.place)
        return found is not None and found.content == content

    def stands(self, content: bytes) -> bool:
        """At once where conditions are honoured."""
        took = time.monotonic() - self._looked
        if not s3.ignores_conditions(self.place, content):
            return True
        return _settled(self, content, took)

    def clear(self, seen: Seen) -> None:
        """Empty it: an object is deleted without conditions, and it may be another's by now."""
        s3.put_if(self.place, b"", seen.version)


class SettlingFile(_StoreFile):
    """In a store of which only writing and reading is known."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self._began: float | None = None
        """The store's time at which this host's steady clock was 0."""

    def read(self) -> Seen:
        """The file; its age is by the store's clock."""
        self._looked = time.monotonic()
        try:
            content = storage.read_bytes(self.place)
        except FileNotFoundError:
            return Seen(None, 0.0, None)
        written = _written(self.place)
        return Seen(content, self._now() - written if written else 0.0, "there")

    def _now(self) -> float:
        """The store's time, which a file that is written now tells, once."""
        if self._began is None:
            probe = f"{self.place}.{uuid.uuid4().hex}.clock"
            storage.write_bytes(probe, b"")
            self._began = (_written(probe) or 0.0) - time.monotonic()
            storage.remove(probe)
        return self._began + time.monotonic()

    def write(self, content: bytes, seen: Seen) -> bool:
        """Whoever writes last stands there."""
        storage.write_bytes(self.place, content)
        return True

    def stands(self, content: bytes) -> bool:
        """After SETTLE seconds."""
        return _settled(self, content, time.monotonic() - self._looked)

    def clear(self, seen: Seen) -> None:
        """Remove the file."""
        storage.remove(self.place)


def _written(place: str) -> float | None:
    """When a file was written, by the store's clock; None if the store does not tell, or it is not there."""
    found = storage.ask(place, lambda system, path: system.get_file_info(path).mtime_ns)
    return float(found) / 1e9 if found else None


def _settled(file: LockFile, content: bytes, took: float) -> bool:
    """Whether the write that took so many seconds since the look before it still stands after SETTLE seconds.

    Two may both have looked before either wrote. Since a write counts only within WRITE_LIMIT of its look, no other
    one that still counts arrives after this wait. Raises TryAgain if this one took longer, and takes it back.
    """
    if took <= WRITE_LIMIT:
        time.sleep(SETTLE)
        return file.read().content == content
    if (seen := file.read()).content == content:
        file.clear(seen)
    raise TryAgain(f"the storage took {took:.0f} s to write a lock, too long to be sure of it; try again later")
