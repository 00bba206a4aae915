"""Lock across processes and hosts: a file under the storage path that survives a crash.

The file says who holds the lock; a thread of the holder renews it every RENEW seconds. A lock that was not renewed
for EXPIRES seconds, or whose process is gone from this machine, is taken over. How the file is written so that only
one of several takers gets it depends on the storage: see lock_file.py.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from olora_ray.common import s3, storage
from olora_ray.common.errors import TryAgain, UserError, short_reason
from olora_ray.common.patience import passes

logger = logging.getLogger(__name__)

# The file of a lock on each kind of storage: how it is read, and written only if nobody else was faster.


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


EXPIRES = 120.0
RENEW = 10.0
POLL = 2.0


class LockUnreadable(TryAgain):
    """Whether a lock still holds cannot be read now: nothing says that it is lost."""


@dataclass(frozen=True)
class Holder:
    """The content of a lock file."""

    token: str
    """Names the holder, whatever else is the same."""
    host: str
    processes: str
    """The namespace in which `pid` counts: containers on a host may share its name."""
    pid: int
    since: float
    """Seconds since 1970, as all times here."""
    renewed: float
    boot: str = ""
    """The kernel's id of this start of the machine: host names repeat, and so does the first namespace's id."""

    def here(self) -> bool:
        """Whether its process, if there is one, is among those that this one sees."""
        mine = _this_machine()
        return bool(self.boot) and (self.host, self.processes, self.boot) == mine

    def gone(self, age: float) -> bool:
        """Whether the lock was not renewed for too long (`age` in seconds), or its process ran here and has ended."""
        if age > EXPIRES:
            return True
        if not self.here():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's process: it is alive
        return False

    def describe(self) -> str:
        """For a person: where it runs and since when."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


class Lock:
    """A lock that this process holds; made by `held`."""

    def __init__(self, place: str, what: str) -> None:
        self.place, self.what = place, what
        host, processes, boot = _this_machine()
        now = time.time()
        self._mine = Holder(uuid.uuid4().hex, host, processes, os.getpid(), now, now, boot)
        self._file: LockFile = lock_file(place, what)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def take(self) -> Holder | None:
        """Take the lock; returns who holds it instead, if somebody does. Raises OSError."""
        while True:
            with self._file.exclusive():
                seen = self._file.read()
                other = _holder(seen)
                if other is not None and not other.gone(seen.age):
                    return other
                content = self._content()
                written = self._file.write(content, seen)
            # Else somebody was faster: look who.
            if written and self._file.stands(content):
                self._thread.start()
                return None

    def check(self) -> None:
        """Raise TryAgain if this lock is lost, LockUnreadable if that cannot be said now.

        Call it before what must not be done twice.
        """
        try:
            other = _holder(self._file.read())
        except OSError as error:
            reason = short_reason(error)
            raise LockUnreadable(f"{self.what}: whether its lock still holds cannot be read: {reason}") from None
        if other is None:
            raise TryAgain(f"{self.what}: its lock {self.place} was removed, so another one may be running; try again")
        if other.token != self._mine.token:
            raise TryAgain(f"{self.what} was taken over ({other.describe()}), because this one was silent for too long")

    def release(self) -> None:
        """Let others take the lock."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError, UserError), self._file.exclusive():
            seen = self._file.read()
            if self._is_mine(seen):
                self._file.clear(seen)

    def _keep(self) -> None:
        while not self._stop.wait(RENEW):
            try:
                with self._file.exclusive():
                    seen = self._file.read()
                    if not self._is_mine(seen):
                        return  # `check` says so
                    self._file.write(self._content(), seen)
            except (OSError, UserError) as error:
                logger.warning(f"{self.what}: the lock cannot be renewed: {short_reason(error)}")

    def _is_mine(self, seen: Seen) -> bool:
        other = _holder(seen)
        return other is not None and other.token == self._mine.token

    def _content(self) -> bytes:
        self._mine = replace(self._mine, renewed=time.time())
        return (json.dumps(asdict(self._mine)) + "\n").encode()


@contextlib.contextmanager
def held(place: str, what: str, wait: float = 0.0, remedy: str | None = None) -> Iterator[Lock]:
    """Hold the lock at `place` (a path or URI) for the block; `what` names it in messages.

    Waits up to `wait` seconds for it. Raises TryAgain that says who holds it and, with `remedy`, what else helps;
    UserError if no lock can be had at `place`.
    """
    lock, end = Lock(place, what), time.monotonic() + wait
    while (other := _taken(lock)) is not None:
        if time.monotonic() >= end:
            advice = "try again later" + (f" or {remedy}" if remedy else "")
            raise TryAgain(f"{what} is already running ({other.describe()}); {advice}")
        time.sleep(POLL)
    try:
        yield lock
    finally:
        lock.release()


def _taken(lock: Lock) -> Holder | None:
    try:
        return lock.take()
    except OSError as error:
        kind = TryAgain if passes(error) else UserError
        raise kind(f"{lock.what}: its lock {lock.place} cannot be written: {short_reason(error)}") from None


def _holder(seen: Seen) -> Holder | None:
    """Who holds the lock; None if nobody does, or what lies there says nobody.

    Fields that this version does not know are left out: a later one may have written it.
    """
    if not seen.content:
        return None
    try:
        tree = json.loads(seen.content)
        known = {each.name for each in fields(Holder)}
        found = Holder(**{name: value for name, value in tree.items() if name in known})
    except (ValueError, TypeError, AttributeError):
        return None
    types = (found.token, str), (found.host, str), (found.pid, int), (found.since, int | float)
    return found if all(isinstance(value, kind) for value, kind in types) else None


def _this_machine() -> tuple[str, str, str]:
    """Host name, namespace of process ids and boot id; '' for what is not known."""
    return socket.gethostname(), _link("/proc/self/ns/pid"), _line("/proc/sys/kernel/random/boot_id")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
