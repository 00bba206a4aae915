"""Lock over a registered model, for the seconds in which its aliases are looked at and moved.

MLflow has no compare-and-set, but it writes a tag in one step, and a look shows all tags of a registered model as
they are. So whoever wants the lock sets a tag of its own and then looks: the lock is held if no other such tag is
there. Of two that come at the same time at least the one whose tag came second sees the other's. Who sees an older
tag than its own takes its own away and tries again; the oldest waits, so one of them always gets on. This holds
for a database as for a server, and for all that name the same model, wherever their storages lie.

Whether a holder is alive cannot be asked. So a tag counts for a while, by each one's own clock: its owner begins
nothing later than LEASE seconds after it was set, and others remove it when they have seen it for STALE seconds, or
at once if its process ran on this machine and has ended. A tag is set once and never again under the same name, so
removing a dead one removes nobody else's. Left open: a process that is suspended for STALE - LEASE seconds between
`check` and the write behind it.
"""

import contextlib
import json
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from olora_ray.common.errors import TryAgain, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK = "olora.lock."
"""Beginning of the tag's name; what follows grows with time."""
LEASE, STALE = 40.0, 80.0
RENEW = 10.0
"""Seconds after which a tag that waits is replaced, so that most of the lease is left to who gets the lock."""
WAIT = 2 * STALE


class RegistryLock:
    """The lock of one registered model, taken by `held`."""

    def __init__(self, client: "MlflowClient", name: str) -> None:
        self.client, self.name = client, name
        self._tag, self._set = "", 0.0
        self._first_seen: dict[str, float] = {}

    def check(self) -> None:
        """Raise TryAgain if the lock was held for too long to write anything more; call it before each write."""
        if now() - self._set > LEASE:
            raise TryAgain(f"{self.name}: MLflow is too slow: moving an alias took over {LEASE:g} s; try again later")

    def take(self) -> None:
        """Take the lock, within WAIT seconds; raises TryAgain that says who holds it, UserError without a model."""
        end = now() + WAIT
        try:
            while (others := self._others()) is None or others:
                if now() > end:
                    raise TryAgain(f"{self.name}: its aliases are being moved by {_owner(others)}; try again later")
                pause()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others take the lock."""
        tag, self._tag = self._tag, ""
        if tag:
            self.client.delete_registered_model_tag(self.name, tag)

    def _others(self) -> Mapping[str, str] | None:
        """The tags of the others, of which this one waits for; None if its own has to be set again."""
        if self._tag and now() - self._set > RENEW:
            self.release()
        if not self._tag:
            self._raise()
        there = self._look()
        if self._tag not in there:  # somebody took this one for dead
            self._tag = ""
            return None
        others = {tag: owner for tag, owner in there.items() if tag != self._tag}
        for tag, owner in others.items():
            if now() - self._first_seen.setdefault(tag, now()) > STALE or _has_ended(owner):
                self.client.delete_registered_model_tag(self.name, tag)
        if others and min(others) < self._tag:
            self.release()
        return others

    def _raise(self) -> None:
        self._set, self._tag = now(), f"{LOCK}{time.time():.6f}.{uuid.uuid4().hex[:8]}"
        owner = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.client.set_registered_model_tag(self.name, self._tag, json.dumps({**owner, "since": since}))

    def _look(self) -> dict[str, str]:
        tags = self.client.get_registered_model(self.name).tags
        return {tag: text for tag, text in tags.items() if tag.startswith(LOCK)}


@contextlib.contextmanager
def held(client: "MlflowClient", name: str) -> Iterator[RegistryLock]:
    """Hold the lock of the registered model `name` for the block.

    Raises TryAgain if others hold it for too long, UserError if there is no such model.
    """
    from mlflow.exceptions import MlflowException

    lock = RegistryLock(client, name)
    try:
        lock.take()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"no model {name!r} is registered in the tracking server") from None
    try:
        yield lock
    finally:
        lock.release()


def now() -> float:
    """Seconds by a clock of this machine that also runs while it is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def pause() -> None:
    """Wait before the next look, of two processes not for the same time."""
    time.sleep(random.uniform(0.1, 0.3))


def _owner(others: Mapping[str, str] | None) -> str:
    try:
        found = json.loads(others[min(others)]) if others else {}
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "somebody else"


def _has_ended(owner: str) -> bool:
    """Whether a tag's process ran on this machine and is gone."""
    try:
        found = json.loads(owner)
        if found["machine"] != _machine():
            return False
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError, OverflowError):  # the last: no number of a process
        return False
    return False


def _machine() -> str:
    """Names the boot and the process namespace in which a process number counts."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return uuid.uuid4().hex  # unknown: nobody's
