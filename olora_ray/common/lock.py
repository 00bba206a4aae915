"""Lock across processes and hosts: a file under the storage path that survives a crash.

The file says who holds the lock; a thread of the holder renews it every RENEW seconds. A lock that was not renewed
for EXPIRES seconds, or whose process is gone from this machine, is taken over. How the file is written so that only
one of several takers gets it depends on the storage: see lock_file.py.
"""

import contextlib
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

from olora_ray.common.errors import TryAgain, UserError, short_reason
from olora_ray.common.lock_file import LockFile, Seen, lock_file
from olora_ray.common.patience import passes

EXPIRES = 120.0
RENEW = 10.0
POLL = 2.0

logger = logging.getLogger(__name__)


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
