"""Lock across processes and hosts: a file under the storage path that survives a crash.

The file says who holds the lock and when it was last renewed; a thread of the holder renews it every RENEW
seconds. A lock that was not renewed for EXPIRES seconds, or whose process is gone from this host, is taken over.

On a file system the look and the write are one step (flock on GUARD, which the kernel releases at a crash). An
object store has no such step: there a taker writes, waits SETTLE seconds and looks whether its own name still
stands there. The hosts' clocks must agree to within half of EXPIRES.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from olora_ray.common import storage
from olora_ray.common.errors import TryAgain

EXPIRES = 120.0
RENEW = 10.0
SETTLE = 3.0
POLL = 2.0
GUARD = ".guard"

logger = logging.getLogger(__name__)


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

    def gone(self) -> bool:
        """Whether the lock was not renewed for too long, or its process ran here and has ended."""
        if abs(time.time() - self.renewed) > EXPIRES:
            return True
        if (self.host, self.processes) != (socket.gethostname(), _processes()):
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
        now = time.time()
        self._mine = Holder(uuid.uuid4().hex, socket.gethostname(), _processes(), os.getpid(), now, now)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def take(self) -> Holder | None:
        """Take the lock; returns who holds it instead, if somebody does."""
        with _guarded(self.place):
            other = _read(self.place)
            if other is not None and not other.gone():
                return other
            self._write()
        if storage.is_uri(self.place):
            # Two takers may both have read "free" before either wrote: after SETTLE the last write stands for both.
            time.sleep(SETTLE)
            other = _read(self.place)
            if other is not None and other.token != self._mine.token:
                return other
        self._thread.start()
        return None

    def check(self) -> None:
        """Raise TryAgain if somebody else has taken the lock over; call it before what must not be done twice."""
        other = _read(self.place)
        if other is not None and other.token != self._mine.token:
            raise TryAgain(f"{self.what} was taken over ({other.describe()}), because this one was silent for too long")

    def release(self) -> None:
        """Let others take the lock."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError), _guarded(self.place):
            other = _read(self.place)
            if other is not None and other.token == self._mine.token:
                storage.remove(self.place)

    def _keep(self) -> None:
        while not self._stop.wait(RENEW):
            try:
                with _guarded(self.place):
                    other = _read(self.place)
                    if other is not None and other.token != self._mine.token:
                        return  # `check` says so
                    self._write()
            except OSError as error:
                logger.warning("%s: the lock cannot be renewed: %s", self.what, error)

    def _write(self) -> None:
        self._mine = replace(self._mine, renewed=time.time())
        storage.write_text(self.place, json.dumps(asdict(self._mine)) + "\n")


@contextlib.contextmanager
def held(place: str, what: str, wait: float = 0.0, remedy: str | None = None) -> Iterator[Lock]:
    """Hold the lock at `place` (a path or URI) for the block; `what` names it in messages.

    Waits up to `wait` seconds for it. Raises TryAgain that says who holds it and, with `remedy`, what else helps.
    """
    lock, end = Lock(place, what), time.monotonic() + wait
    while (other := lock.take()) is not None:
        if time.monotonic() >= end:
            advice = "try again later" + (f" or {remedy}" if remedy else "")
            raise TryAgain(f"{what} is already running ({other.describe()}); {advice}")
        time.sleep(POLL)
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def _guarded(place: str) -> Iterator[None]:
    """Nobody else looks at or writes the lock file meanwhile, where the storage is a file system."""
    if storage.is_uri(place):
        yield
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place + GUARD, "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _read(place: str) -> Holder | None:
    """The lock's holder; None if nobody holds it, or the file cannot be read."""
    try:
        return Holder(**json.loads(storage.read_text(place)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None


def _processes() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
