"""Lock across processes and hosts: a small file under the storage path that says who holds it and survives a crash.

A thread of the holder writes the file again every RENEW seconds. A lock is taken over if it was not renewed for EXPIRES
seconds, by the storage's own clock, or if its holder ran on this machine and has ended. Storages differ in how only one
of several takers gets the lock: a file system has flock, S3 has conditional writes, and where a store has neither the
last writer gets it, after a wait within which all others have written.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from olora_ray.common import s3, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, short_reason
from olora_ray.common.patience import passes

logger = logging.getLogger(__name__)

EXPIRES = 120.0
RENEW = 10.0
SETTLE = 20.0
"""Seconds that a writer waits in a store without conditional writes before its name counts."""
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOLCK)


class LockUnreadable(TryAgain):
    """A lock cannot be read now: nothing says that it is lost."""


@dataclass(frozen=True)
class Seen:
    """The content of a lock's file at one moment."""

    content: bytes | None
    """None: there is no file."""
    version: str | None = None
    """The version that a conditional write has to find unchanged."""


class LockFile:
    """The file of a lock in a store that can only write and read."""

    def __init__(self, place: str, what: str) -> None:
        self.place, self.what = place, what
        self._looked = self._took = 0.0

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from reading and writing for the block, where the storage can."""
        return contextlib.nullcontext()

    def read(self) -> Seen:
        """Look; raises OSError."""
        self._looked = time.monotonic()
        try:
            return Seen(storage.read_bytes(self.place))
        except FileNotFoundError:
            return Seen(None)

    def write(self, content: bytes, seen: Seen) -> bool:
        """Write unless the storage tells that the file has changed since `seen`; raises OSError."""
        storage.write_bytes(self.place, content)
        self._took = time.monotonic() - self._looked
        return True

    def stands(self, content: bytes) -> bool:
        """True if what a new holder has just written counts; raises OSError, TryAgain.

        Two may both have looked before either wrote. A write counts only if it ended within 0.75 SETTLE of its look, so
        none that counts arrives after SETTLE: the one that is there then has the lock.
        """
        if self._took <= 0.75 * SETTLE:
            time.sleep(SETTLE)
            return self.read().content == content
        if (seen := self.read()).content == content:
            self.clear(seen)
        raise TryAgain(
            f"the storage took {self._took:.0f} s to write a lock, too long to be sure of it; try again later"
        )

    def clear(self, seen: Seen) -> None:
        """Give the lock back; raises OSError."""
        storage.remove(self.place)


class LocalFile(LockFile):
    """On a file system with flock, local or shared."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold flock on a file beside the lock; raises UserError where the file system has none."""
        path = Path(self.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"{self.what}: its lock {path} is a folder; remove it")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(storage.flocked(path.with_name(f"{path.name}.guard")))
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                raise UserError(
                    f"{self.what}: the file system of {path} has no file locks ({error.strerror}); mount it with them"
                    " (Lustre: -o flock), or set run.storage to a place that has them"
                ) from None
            yield

    def stands(self, content: bytes) -> bool:
        """True: nobody else wrote meanwhile."""
        return True


class S3File(LockFile):
    """In an S3 store; one that ignores conditions is treated as a store that has none."""

    def read(self) -> Seen:
        """The object."""
        self._looked = time.monotonic()
        return Seen(*s3.get(self.place) or (None, None))

    def write(self, content: bytes, seen: Seen) -> bool:
        """Write if the object is still the one that was seen."""
        written = s3.put_if(self.place, content, seen.version) is not None
        self._took = time.monotonic() - self._looked
        # A request that was repeated may have been the first to arrive: then this content is there.
        return written or (s3.get(self.place) or (None,))[0] == content

    def stands(self, content: bytes) -> bool:
        """True at once if the store refuses to write the object that is there a second time."""
        return s3.put_if(self.place, content, None) is None or super().stands(content)

    def clear(self, seen: Seen) -> None:
        """Empty it: an object cannot be deleted on a condition, and it may be another's by now."""
        s3.put_if(self.place, b"", seen.version)


@dataclass(frozen=True)
class Holder:
    """The content of a lock file."""

    token: str
    """Names the holder, whatever else is the same."""
    host: str
    machine: str
    """The boot and the namespace in which `pid` counts: host names repeat. Empty: not known."""
    pid: int
    since: float
    renewed: float

    def has_ended(self) -> bool:
        """True if its process ran where this one does, and is gone."""
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
        """Say where it runs and since when."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


_HOLDER = TypeAdapter(Holder)


class Lock:
    """A lock that this process holds; made by `held`."""

    def __init__(self, place: str, what: str) -> None:
        self.what = what
        if (path := storage.local_path(place)) is not None:
            self._file: LockFile = LocalFile(str(path), what)
        elif s3.is_s3(place):
            s3.require_boto3(place, what)
            self._file = S3File(place, what)
        else:
            self._file = LockFile(place, what)
        now = time.time()
        self._mine = Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), now, now)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def take(self) -> Holder | None:
        """Take the lock; returns who holds it instead, if somebody does. Raises OSError."""
        while True:
            with self._file.alone():
                seen = self._file.read()
                other = _holder(seen)
                if other is not None and not other.has_ended() and _age(self._file.place) <= EXPIRES:
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
            place = self._file.place
            raise TryAgain(f"{self.what}: its lock {place} was removed, so another one may be running; try again")
        if other.token != self._mine.token:
            raise TryAgain(f"{self.what} was taken over ({other.describe()}), because this one was silent for too long")

    def release(self) -> None:
        """Let others take the lock."""
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
                        return  # `check` says so
                    self._file.write(self._content(), seen)
            except (OSError, UserError) as error:
                logger.warning(f"{self.what}: the lock cannot be renewed: {short_reason(error)}")

    def _is_mine(self, seen: Seen) -> bool:
        other = _holder(seen)
        return other is not None and other.token == self._mine.token

    def _content(self) -> bytes:
        self._mine = replace(self._mine, renewed=time.time())  # another content each time, so another version on S3
        return (json.dumps(asdict(self._mine)) + "\n").encode()


@contextlib.contextmanager
def held(place: str, what: str, remedy: str | None = None) -> Iterator[Lock]:
    """Hold the lock at `place` (a path or URI) for the block; `what` names it in messages.

    Raises TryAgain that says who holds it and, with `remedy`, what else helps; UserError if no lock can be had there.
    """
    lock = Lock(place, what)
    with as_user_error(f"{what}: its lock {place} cannot be written", OSError, reason=short_reason, passes=passes):
        other = lock.take()
    if other is not None:
        advice = "try again later" + (f" or {remedy}" if remedy else "")
        raise TryAgain(f"{what} is already running ({other.describe()}); {advice}")
    try:
        yield lock
    finally:
        lock.release()


def is_held(place: str) -> bool:
    """True if the lock at `place` is held, by this machine's clock: a look that writes nothing. Raises OSError."""
    try:
        found = _holder(Seen(storage.read_bytes(place)))
    except FileNotFoundError:
        return False
    return found is not None and not found.has_ended() and time.time() - found.renewed <= EXPIRES


def _holder(seen: Seen) -> Holder | None:
    """Who holds the lock; None if nobody does, or what lies there says nobody."""
    try:
        return _HOLDER.validate_json(seen.content) if seen.content else None
    except ValidationError:
        return None


def _age(place: str) -> float:
    """Seconds since a file was written, by the storage's own clock: no host's clock has to be right.

    A file that is written now tells the storage's time. 0 if the storage tells no times, or the file is gone.
    """
    probe = storage.join(place.rpartition("/")[0], f".clock-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"", durable=False)
    now, written = (
        storage.ask(each, lambda system, path: system.get_file_info(path).mtime_ns) for each in (probe, place)
    )
    storage.remove(probe)
    return (now - written) / 1e9 if now and written else 0.0


def _machine() -> str:
    """The boot of this machine and its namespace of process ids; empty where the system does not tell them."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
