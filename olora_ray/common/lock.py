"""Lock across processes and hosts: a small file in the storage that names its holder and survives a crash.

A thread of the holder writes the file again every RENEW seconds. Another process takes the lock over if the file was
not renewed for EXPIRES seconds, by the storage's own clock, or if the holder ran on this machine and has ended.

If several processes try to take the lock at once, only one may get it. File systems have flock for that, and S3 has
conditional writes. In a store with neither, the last writer gets the lock, after a wait in which all others have
written.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from olora_ray.common import records, s3, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, short_reason
from olora_ray.common.retry import transient

logger = logging.getLogger(__name__)

EXPIRES = 120.0
RENEW = 10.0
SETTLE = 20.0
"""Seconds that a taker waits in a store without conditional writes before it holds the lock."""
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOLCK)


class LockHeld(TryAgain):
    """Another process holds the lock."""

    def __init__(self, message: str, since: float) -> None:
        super().__init__(message)
        self.since = since
        """Time at which the other process took it, in seconds since 1970."""


class LockUnreadable(TryAgain):
    """The lock cannot be read now. It may still be held."""


@dataclass(frozen=True)
class Seen:
    content: bytes | None
    """None if the file does not exist."""
    version: str | None = None
    """The etag that a conditional write expects."""


class LockFile:
    """A lock file in a store without flock and without conditional writes; the other classes override its methods.

    `subject` names what the lock protects, for messages. All methods may raise OSError.
    """

    def __init__(self, location: str, subject: str) -> None:
        self.location = location
        self.subject = subject
        self._read_at = self._took = 0.0

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from reading and writing the file during the block, if the storage can."""
        return contextlib.nullcontext()

    def read(self) -> Seen:
        self._read_at = time.monotonic()
        try:
            return Seen(storage.read_bytes(self.location))
        except FileNotFoundError:
            return Seen(None)

    def write(self, content: bytes, seen: Seen) -> bool:
        """Write the file. False if the storage knows that it has changed since `seen`; then nothing is written."""
        storage.write_bytes(self.location, content)
        self._took = time.monotonic() - self._read_at
        return True

    def stands(self, content: bytes) -> bool:
        """True if the process that has just written `content` holds the lock. Raises TryAgain if the write was slow."""
        # Several takers may have read the file before any of them wrote. A write is valid only if it ended within 0.75
        # SETTLE of its read. So all valid writes have arrived after SETTLE, and the last of them has the lock.
        if self._took <= 0.75 * SETTLE:
            time.sleep(SETTLE)
            return self.read().content == content
        seen = self.read()
        if seen.content == content:
            self.clear(seen)
        raise TryAgain(
            f"the storage took {self._took:.0f} s to write a lock, which is too slow for a safe lock; try again later"
        )

    def clear(self, seen: Seen) -> None:
        storage.remove(self.location)


class LocalFile(LockFile):
    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        path = Path(self.location)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"{self.subject}: its lock {path} is a folder; remove it")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(storage.flocked(path.with_name(f"{path.name}.guard")))
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                raise UserError(
                    f"{self.subject}: the file system of {path} has no file locks ({error.strerror}); mount it with"
                    " locks (Lustre: -o flock), or set run.storage to a folder elsewhere"
                ) from None
            yield

    def stands(self, content: bytes) -> bool:
        return True  # flock kept all other processes out during the write


class S3File(LockFile):
    """A lock file in an S3 store. A store that ignores conditional writes is treated like a store without them."""

    def read(self) -> Seen:
        self._read_at = time.monotonic()
        return Seen(*s3.get(self.location) or (None, None))

    def write(self, content: bytes, seen: Seen) -> bool:
        written = s3.put_if(self.location, content, seen.version) is not None
        self._took = time.monotonic() - self._read_at
        # If the client retried a request whose first attempt had arrived, the retry is refused although it succeeded.
        return written or (s3.get(self.location) or (None,))[0] == content

    def stands(self, content: bytes) -> bool:
        # A store that refuses to create an object that exists obeys conditions: then the write was the only one.
        return s3.put_if(self.location, content, None) is None or super().stands(content)

    def clear(self, seen: Seen) -> None:
        # Another process may hold the lock by now. S3 has no conditional delete, so empty the object on a condition.
        s3.put_if(self.location, b"", seen.version)


@dataclass(frozen=True)
class Holder:
    token: str
    """Identifies the holder; the other fields may be equal for two holders."""
    host: str
    machine: str
    """The boot of the machine and the PID namespace of `pid`, because host names repeat; empty if unknown."""
    pid: int
    since: float
    renewed: float

    def has_ended(self) -> bool:
        """True if the holder ran on this boot of this machine, in this PID namespace, and its process has ended."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's process: it is alive
        return False

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


class Lock:
    """A lock that this process holds, as yielded by `held`."""

    def __init__(self, location: str, subject: str) -> None:
        self.subject = subject
        path = storage.local_path(location)
        if path is not None:
            self._file: LockFile = LocalFile(str(path), subject)
        elif s3.is_s3(location):
            s3.require_boto3(location, subject)
            self._file = S3File(location, subject)
        else:
            self._file = LockFile(location, subject)
        now = time.time()
        self._mine = Holder(
            uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), now, now
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def take(self) -> Holder | None:
        """Take the lock, or return its other holder. Raises OSError."""
        while True:
            with self._file.alone():
                seen = self._file.read()
                other = _holder(seen)
                if other is not None and not other.has_ended() and self._age() <= EXPIRES:
                    return other
                content = self._content()
                written = self._file.write(content, seen)
            # If another process was faster, read the file again to see who holds the lock.
            if written and self._file.stands(content):
                self._thread.start()
                return None

    def _age(self) -> float:
        """Return the seconds since the file was written; 0 if the storage tells no times, or the file is missing."""
        # A file that is written now has the storage's current time. So it does not matter if the hosts' clocks differ.
        folder = self._file.location.rpartition("/")[0]
        probe = storage.join(folder, f".clock-{uuid.uuid4().hex}")
        storage.write_bytes(probe, b"", durable=False)
        now = storage.info(probe).mtime_ns
        written = storage.info(self._file.location).mtime_ns
        storage.remove(probe)
        if not now or not written:
            return 0.0
        return float((now - written) / 1e9)

    def check(self) -> None:
        """Raise TryAgain if this lock is lost, or LockUnreadable if the lock file cannot be read now.

        Call it before an action that only one process may do.
        """
        try:
            other = _holder(self._file.read())
        except OSError as error:
            raise LockUnreadable(
                f"{self.subject}: its lock cannot be read: {short_reason(error)}"
            ) from None
        if other is None:
            lock = self._file.location
            raise TryAgain(
                f"{self.subject}: its lock {lock} was removed, so another process may hold it; try again"
            )
        if other.token != self._mine.token:
            raise TryAgain(
                f"{self.subject} was taken over ({other.describe()}): its lock was not renewed in time"
            )

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError, UserError), self._file.alone():
            seen = self._file.read()
            if self._is_mine(seen):
                self._file.clear(seen)

    def _keep(self) -> None:
        while not self._stop.wait(RENEW):
            try:
                with self._file.alone():
                    seen = self._file.read()
                    if not self._is_mine(seen):
                        return  # the lock is lost: `check` raises
                    self._file.write(self._content(), seen)
            except (OSError, UserError) as error:
                logger.warning(f"{self.subject}: the lock cannot be renewed: {short_reason(error)}")

    def _is_mine(self, seen: Seen) -> bool:
        other = _holder(seen)
        return other is not None and other.token == self._mine.token

    def _content(self) -> bytes:
        # On S3 the etag is a digest of the content, so each renewal must change the content to get another etag.
        self._mine = replace(self._mine, renewed=time.time())
        return f"{records.text_of(self._mine)}\n".encode()


@contextlib.contextmanager
def held(file: str, subject: str, remedy: str | None = None) -> Iterator[Lock]:
    """Hold the lock in `file` (a path or URI) for the block. `subject` names what it protects, for messages.

    Raises LockHeld, with the holder and the `remedy`, if the lock is held; UserError if the storage allows no lock.
    """
    lock = Lock(file, subject)
    with as_user_error(
        f"{subject}: its lock {file} cannot be written",
        OSError,
        reason=short_reason,
        passes=transient,
    ):
        other = lock.take()
    if other is not None:
        advice = "try again later"
        if remedy:
            advice += f" or {remedy}"
        raise LockHeld(f"{subject} is already running ({other.describe()}); {advice}", other.since)
    try:
        yield lock
    finally:
        lock.release()


def is_held(location: str) -> bool:
    """True if the lock at `location` is held, by this machine's clock. Writes nothing. Raises OSError."""
    holder = records.read(location, Holder)
    return holder is not None and not holder.has_ended() and time.time() - holder.renewed <= EXPIRES


def _holder(seen: Seen) -> Holder | None:
    # A missing, empty or damaged file has no holder.
    return records.parsed(seen.content or b"", Holder)


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
