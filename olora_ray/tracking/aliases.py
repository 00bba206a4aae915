"""Aliases of a registered model, and their moves: champion, challenger, previous.

    promote     previous <- champion, champion <- VERSION           the files are checked first
    rollback    champion <- previous                                the bad version is tagged
    refuse      the version stays challenger, the reason is a tag

All three look and write under the model's lock (registry_lock.py), whoever calls them: command line or retraining.
A reader of `models:/NAME@champion` sees the old or the new version, never none: the alias is moved by one write,
and that write is the move. What belongs to it is written down before: what the verdict stands on at the version, where
it counts with the verdict only, and the rest as the tag MOVING of the registered model. If the mover dies the next call
finishes a move whose alias stands where it was to stand. Any other is dropped: either it had not begun, or somebody has
moved the alias by hand since.
"""

import contextlib
import json
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from olora_ray.common.errors import TryAgain, UserError
from olora_ray.tracking import checksums
from olora_ray.tracking.checksums import Version, name_filter
from olora_ray.tracking.client import connect, is_unavailable, reachable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

logger = logging.getLogger(__name__)

# A move of a registered model's aliases, as it is announced in MLflow before it is made.


LONGEST = 5000
"""Characters of a registered model's tag: MLflow's column, which PostgreSQL and MySQL enforce."""


@dataclass(frozen=True)
class Move:
    """All that one move of the aliases writes."""

    champion: str
    """Version that becomes the champion."""
    previous: str | None
    """Version that becomes `previous`; None: there is none any more."""
    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Version -> tags it gets: its verdict. What that stands on is too long to be announced."""
    was: Mapping[str, str] | None = None
    """The champion and `previous` before; None: not known, the move was announced by an older release."""

    def to_json(self) -> str:
        """The MOVING tag, with the tags' texts cut as far as it takes to be no longer than a tag can be."""
        size = LONGEST
        while True:
            texts = {number: {key: text[:size] for key, text in each.items()} for number, each in self.tags.items()}
            found = json.dumps(asdict(replace(self, tags=texts)))
            if len(found) <= LONGEST or not size:
                return found
            size //= 2

    @classmethod
    def from_json(cls, text: str) -> "Move":
        """Read a MOVING tag; raises ValueError for anything else."""
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError("not a move")
        tags, was, previous = tree.get("tags"), tree.get("was"), tree.get("previous")
        if not isinstance(tags, dict) or not all(isinstance(each, dict) for each in tags.values()):
            raise ValueError("not a move")
        if not isinstance(was, dict | None) or not isinstance(tree.get("champion"), str):
            raise ValueError("not a move")
        texts = {str(number): {str(key): str(text) for key, text in each.items()} for number, each in tags.items()}
        return cls(tree["champion"], None if previous is None else str(previous), texts, was)


# Lock over a registered model, for the seconds in which its aliases are looked at and moved.


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


CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
GATE = "olora.gate"
"""Tag of a version: passed, refused, promoted or rolled back, and why."""
MOVING = "olora.moving"
LAST = "olora.last_champion"
"""Tag of a registered model: the champion. It outlives the alias and the version."""
ROLLED_BACK = "rolled back"


def rolled_back(version: Version) -> bool:
    """True if the version was the champion and was found to be bad."""
    return version.tags.get(GATE, "").startswith(ROLLED_BACK)


class Overtaken(Exception):
    """The registry is no longer what a decision was made on."""


class Aliases:
    """The aliases of one registered model.

    All methods raise UserError for a model or version that is not there, and TrackingUnavailable if MLflow does not
    answer; those that write raise TryAgain if others hold the model's lock for minutes.
    """

    def __init__(self, tracking_uri: str, name: str) -> None:
        self.uri, self.name = tracking_uri, name

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client; call it inside `reachable(aliases.uri)`."""
        return connect(self.uri)

    def current(self) -> dict[str, str]:
        """Alias -> version; empty if there is no such model yet."""
        with reachable(self.uri):
            return self._now()

    def last_champion(self) -> str | None:
        """The champion, or the last one if the alias was deleted; a champion that was set by hand is recorded."""
        with reachable(self.uri):
            found, champion = self._model(), self._now().get(CHAMPION)
            last = None if found is None else found.tags.get(LAST)
        if champion is None or champion == last:
            return last
        with self._locked() as lock:
            if champion := self._now().get(CHAMPION):
                lock.check()
                self.client.set_registered_model_tag(self.name, LAST, champion)
            return champion or last

    def version(self, number: str) -> Version:
        """One version."""
        with reachable(self.uri):
            return self._version(number)

    def versions(self) -> list[Version]:
        """All versions, the oldest first; empty if there is no such model yet."""
        with reachable(self.uri):
            found: list[Version] = []
            token = None
            while True:
                page = self.client.search_model_versions(name_filter(self.name), page_token=token)
                found.extend(map(Version.of, page))
                token = page.token
                if not token:
                    return sorted(found, key=lambda item: int(item.number))

    def of_run(self, run_id: str) -> Version | None:
        """The version that an MLflow run has registered; None if it has none here, or it was deleted."""
        return next((each for each in reversed(self.versions()) if each.run_id == run_id), None)

    def verify(self, number: str) -> int:
        """Check that a version's files are those of its registration, return how many there are; raises UserError."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            place = str(self.client.get_model_version_download_uri(self.name, number))
            return checksums.verify(version, place, self.uri)

    def verify_copy(self, number: str, folder: Path) -> None:
        """Check that a folder here is a copy of a version's merged model; raises UserError if it is not."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            place = str(self.client.get_model_version_download_uri(self.name, number))
            checksums.verify_copy(version, place, self.uri, folder)

    def promote(
        self,
        number: str,
        why: str,
        tags: Mapping[str, str] | None = None,
        *,
        instead_of: str | None = None,
        beaten: str | None = None,
    ) -> str | None:
        """Let a version become the champion if its files are whole; returns the version it takes over from.

        `instead_of` is the champion on which that was decided, "" for none; None: whichever it is. Raises Overtaken
        if it has changed, or the version itself was promoted or rolled back meanwhile. If there is no champion,
        `beaten` becomes `previous`; without it `previous` stays.
        """
        self.verify(number)  # it may take minutes: before the lock
        with self._locked() as lock:
            self._unchanged(number, instead_of)
            self._record(lock, number, tags or {})
            there = self._now()
            old = there.get(CHAMPION, beaten)
            kept = there.get(PREVIOUS) if old in (None, number) else old
            self._move(lock, Move(number, kept if kept != number else None, {number: {GATE: why}}, _pair(there)))
            return old if old != number else None

    def refuse(
        self, number: str, why: str, tags: Mapping[str, str] | None = None, *, instead_of: str | None = None
    ) -> None:
        """Let a version stay what it is, with the reason; the aliases do not move. Raises as `promote`."""
        with self._locked() as lock:
            self._unchanged(number, instead_of)
            self._record(lock, number, tags or {})
            lock.check()
            self.client.set_model_version_tag(self.name, number, GATE, why)

    def rollback(self, why: str) -> tuple[str, str]:
        """Give `champion` back to the version before, if its files are whole; returns (bad version, good version)."""
        self.repair()
        there = self.current()
        bad, good = there.get(CHAMPION), there.get(PREVIOUS)
        if bad is None or good is None:
            first = f"version {bad} is the first champion, or already back, or the version before it was deleted"
            named = "there is no champion" if bad is None else first
            raise UserError(f"{self.name}: nothing to roll back to: {named}; `promote` sets any version")
        self.verify(good)
        with self._locked() as lock:
            there = self._now()
            if (there.get(CHAMPION), there.get(PREVIOUS)) != (bad, good):
                raise UserError(
                    f"{self.name}: the champion was moved at this moment, from version {bad} to"
                    f" {there.get(CHAMPION, 'none')}; look again with `list`, and roll back if it is still wanted"
                )
            self._move(lock, Move(good, None, {bad: {GATE: f"{ROLLED_BACK}: {why}"}}, _pair(there)))
        return bad, good

    def repair(self) -> Move | None:
        """Finish a move that was cut off, or drop it, if there is one; returns it if it is finished."""
        with reachable(self.uri):
            found = self._model()
            if found is None or MOVING not in found.tags:
                return None
            with held(self.client, self.name) as lock:
                return self._repair(lock)

    @contextmanager
    def _locked(self) -> Iterator[RegistryLock]:
        """The model's lock; what an earlier holder has left half-done is done."""
        with reachable(self.uri), held(self.client, self.name) as lock:
            self._repair(lock)
            yield lock

    def _unchanged(self, number: str, instead_of: str | None) -> None:
        """Raise Overtaken if the champion is not `instead_of`, or a person has decided on the version itself."""
        version, champion = self._version(number), self._now().get(CHAMPION)
        if instead_of is None:
            return
        if champion == number or rolled_back(version):
            raise Overtaken(f"version {number} was promoted or rolled back by hand meanwhile")
        if (champion or "") != instead_of:
            was = f"version {instead_of}" if instead_of else "none"
            raise Overtaken(f"the champion was {was}, and is {f'version {champion}' if champion else 'none'} by now")

    def _record(self, lock: RegistryLock, number: str, tags: Mapping[str, str]) -> None:
        """Write what a verdict stands on. The verdict comes last and makes it count; one of before does no longer."""
        if tags and GATE in self._version(number).tags:
            lock.check()
            self.client.delete_model_version_tag(self.name, number, GATE)
        for name, text in tags.items():
            lock.check()
            self.client.set_model_version_tag(self.name, number, name, text)

    def _repair(self, lock: RegistryLock) -> Move | None:
        found = self._model()
        text = found.tags.get(MOVING) if found is not None else None
        if text is None:
            return None
        champion = self._now().get(CHAMPION)
        try:
            move = Move.from_json(text)
        except ValueError:
            logger.warning(f"registry: {self.name}: the tag {MOVING} is not one of this project; it is removed")
        else:
            if champion == move.champion:
                self._finish(lock, move)
                logger.info(f"registry: finished a move that was cut off: version {champion} is the champion")
                return move
            logger.warning(
                f"registry: {self.name}: a move of the champion to version {move.champion} was cut off before it, or"
                f" undone by hand since; it is dropped, the champion is {f'version {champion}' if champion else 'none'}"
            )
        lock.check()
        self.client.delete_registered_model_tag(self.name, MOVING)
        return None

    def _move(self, lock: RegistryLock, move: Move) -> None:
        lock.check()
        self.client.set_registered_model_tag(self.name, MOVING, move.to_json())
        lock.check()
        self.client.set_registered_model_alias(self.name, CHAMPION, move.champion)
        self._finish(lock, move)

    def _finish(self, lock: RegistryLock, move: Move) -> None:
        for write in self._rest(move):
            lock.check()
            with _unless_deleted():
                write()

    def _rest(self, move: Move) -> Iterator[Callable[[], object]]:
        """All writes of a move but that of the champion; any number of them may have been done before."""
        client, name, there = self.client, self.name, self._now()
        yield partial(client.set_registered_model_tag, name, LAST, move.champion)
        for number, tags in move.tags.items():
            for key, text in tags.items():
                yield partial(client.set_model_version_tag, name, number, key, text)
        if move.was is None or there.get(PREVIOUS) == move.was.get(PREVIOUS):  # else somebody has moved it since
            if move.previous is not None:
                yield partial(client.set_registered_model_alias, name, PREVIOUS, move.previous)
            elif PREVIOUS in there:
                yield partial(client.delete_registered_model_alias, name, PREVIOUS)
        if there.get(CHALLENGER) == move.champion:
            yield partial(client.delete_registered_model_alias, name, CHALLENGER)
        yield partial(client.delete_registered_model_tag, name, MOVING)

    def _now(self) -> dict[str, str]:
        found = self._model()
        return {str(alias): str(version) for alias, version in found.aliases.items()} if found else {}

    def _version(self, number: str) -> Version:
        from mlflow.exceptions import MlflowException

        try:
            return Version.of(self.client.get_model_version(self.name, number))
        except (MlflowException, OverflowError) as error:  # a number that no database has
            if is_unavailable(error):
                raise
            raise UserError(f"{self.name} has no version {number}; {self._there()}") from None

    def _model(self) -> "RegisteredModel | None":
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if is_unavailable(error) or error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _there(self) -> str:
        versions = [item.number for item in self.versions()]
        if not versions and self._model() is None:
            return f"no model {self.name!r} is registered in the tracking server"
        return f"it has {', '.join(versions) or 'none'}"


def _pair(aliases: Mapping[str, str]) -> dict[str, str]:
    return {alias: aliases[alias] for alias in (CHAMPION, PREVIOUS) if alias in aliases}


@contextmanager
def _unless_deleted() -> Iterator[None]:
    """A version that has been deleted needs no tags and no alias any more."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
