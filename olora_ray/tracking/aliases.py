"""Aliases of a registered model, and their moves: champion, challenger, previous.

    promote     previous <- champion, champion <- VERSION           the files are checked first
    rollback    champion <- previous                                the bad version is tagged
    refuse      the version stays challenger, the reason is a tag

All three look and write under the model's lock, whoever calls them: command line or retraining. A reader of
`models:/NAME@champion` sees the old or the new version, never none: one write moves the alias, and that write is the
move. Before it, the version that is to be the champion gets the tag MOVE, with what else the move writes. If the mover
dies, the next call finds the tag at the champion and completes the move. At any other version the tag means nothing:
either the move had not begun, or somebody has moved the alias since.
"""

import json
import logging
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from olora_ray.common.errors import TryAgain, UserError
from olora_ray.tracking import checksums
from olora_ray.tracking.checksums import Version, name_filter
from olora_ray.tracking.client import connect, is_unavailable, reachable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

logger = logging.getLogger(__name__)

# Lock over a registered model, for the seconds in which its aliases are looked at and moved. It lies in MLflow, because
# people and retrainings on several machines move the aliases of one MLflow without a storage in common.


LOCK = "olora.lock."
"""Beginning of the name of a registered model's tag; the rest is the holder's own."""
LEASE, STALE = 40.0, 80.0
"""Seconds after which a holder writes nothing more, and after which others remove its tag."""


class RegistryLock:
    """The lock of one registered model, taken by `held`.

    Each process that wants it sets a tag of the model; who sees no other tag then has the lock. MLflow has no
    conditional write, but of two that set a tag at least the second sees the other's.
    """

    def __init__(self, client: "MlflowClient", name: str) -> None:
        self.client, self.name = client, name
        self._tag, self._set = "", 0.0

    def now(self) -> float:
        """Seconds by a clock of this machine that also runs while it is suspended."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def pause(self) -> None:
        """Wait before the next try, of two processes not for the same time."""
        time.sleep(random.uniform(0.1, 0.5))

    def check(self) -> None:
        """Raise TryAgain if the lock was held for too long to write anything more; call it before each write."""
        if self.now() - self._set > LEASE:
            raise TryAgain(f"{self.name}: MLflow is too slow: moving an alias took over {LEASE:g} s; try again later")

    def take(self) -> None:
        """Take the lock; raises TryAgain that says who holds it, UserError without a model."""
        end, first_seen = self.now() + 2 * STALE, dict[str, float]()
        while others := self._try():
            for tag in others:
                if self.now() - first_seen.setdefault(tag, self.now()) > STALE:  # its holder writes nothing more
                    self.client.delete_registered_model_tag(self.name, tag)
            if self.now() > end:
                owner = others[min(others)]
                raise TryAgain(f"{self.name}: its aliases are being moved by {owner}; try again later")
            self.pause()

    def _try(self) -> dict[str, str]:
        """Set the own tag and look; returns the tags of others, with the own one removed if there are any."""
        self._set, self._tag = self.now(), f"{LOCK}{uuid.uuid4().hex}"
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        try:
            self.client.set_registered_model_tag(self.name, self._tag, owner)
            tags = self.client.get_registered_model(self.name).tags
        except BaseException:
            self.release()
            raise
        found = {tag: text for tag, text in tags.items() if tag.startswith(LOCK)}
        if found.pop(self._tag, None) is None:  # MLflow took longer than STALE
            found[self._tag] = owner
        if found:
            self.release()
        return found

    def release(self) -> None:
        """Let others take the lock."""
        self.client.delete_registered_model_tag(self.name, self._tag)


@contextmanager
def held(lock: RegistryLock) -> Iterator[RegistryLock]:
    """Hold the lock of a registered model for the block.

    Raises TryAgain if others hold it for too long, UserError if there is no such model.
    """
    from mlflow.exceptions import MlflowException

    try:
        lock.take()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"no model {lock.name!r} is registered in the tracking server") from None
    try:
        yield lock
    finally:
        lock.release()


# The aliases.


CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
GATE = "olora.gate"
"""Tag of a version: passed, refused, promoted or rolled back, and why."""
MOVE = "olora.move"
"""Tag of a version: what else belongs to the move that makes it the champion, until that is done."""
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

    lock: ClassVar[type[RegistryLock]] = RegistryLock

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

    def place(self, number: str) -> str:
        """The address of a version's files."""
        with reachable(self.uri, upload=True):
            return str(self.client.get_model_version_download_uri(self.name, number))

    def verify(self, number: str) -> int:
        """Check that a version's files are those of its registration, return how many there are; raises UserError."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            return checksums.verify(version, self.place(number), self.uri)

    def verify_copy(self, number: str, folder: Path) -> None:
        """Check that a folder here is a copy of a version's merged model; raises UserError if it is not."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            checksums.verify_copy(version, self.place(number), self.uri, folder)

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
            self._move(lock, number, kept if kept != number else None, {number: why})
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
            self._move(lock, good, None, {bad: f"{ROLLED_BACK}: {why}"})
        return bad, good

    def repair(self) -> None:
        """Complete a move that was cut off, if there is one."""
        with reachable(self.uri):
            if self._cut_off() is not None:
                with self._locked():
                    pass

    @contextmanager
    def _locked(self) -> Iterator[RegistryLock]:
        """The model's lock; what an earlier holder has left half-done is done."""
        with reachable(self.uri), held(self.lock(self.client, self.name)) as lock:
            if (champion := self._cut_off()) is not None:
                self._finish(lock, champion)
            yield lock

    def _cut_off(self) -> Version | None:
        """The champion, if the move to it was not completed."""
        champion = self._now().get(CHAMPION)
        found = None if champion is None else self._version(champion)
        return found if found is not None and MOVE in found.tags else None

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
        """Delete the old verdict, then write the evidence of the new one: evidence without a verdict is ignored."""
        before = self._version(number).tags if tags else {}
        for name in (GATE, MOVE):
            if name in before:
                lock.check()
                self.client.delete_model_version_tag(self.name, number, name)
        for name, text in tags.items():
            lock.check()
            self.client.set_model_version_tag(self.name, number, name, text)

    def _move(self, lock: RegistryLock, champion: str, previous: str | None, verdicts: Mapping[str, str]) -> None:
        """Let a version be the champion, another one `previous` (None: none), and set the verdicts, version -> text."""
        announced = json.dumps({"previous": previous, "verdicts": verdicts})
        lock.check()
        self.client.set_model_version_tag(self.name, champion, MOVE, announced)
        lock.check()
        self.client.set_registered_model_alias(self.name, CHAMPION, champion)
        self._finish(lock, self._version(champion))

    def _finish(self, lock: RegistryLock, champion: Version) -> None:
        """Make all writes of a move but that of the champion; any number of them may have been made before."""
        from mlflow.exceptions import MlflowException

        for write in self._rest(champion):
            lock.check()
            try:
                write()
            except MlflowException as error:  # a version that has been deleted needs no tag and no alias
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise

    def _rest(self, champion: Version) -> Iterator[Callable[[], object]]:
        client, name, number, there = self.client, self.name, champion.number, self._now()
        yield partial(client.set_registered_model_tag, name, LAST, number)
        try:
            previous, verdicts = _announced(champion.tags[MOVE])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            logger.warning(f"registry: {name} version {number}: its tag {MOVE} cannot be read; it is removed")
            previous, verdicts = there.get(PREVIOUS), {}
        for version, text in verdicts.items():
            yield partial(client.set_model_version_tag, name, version, GATE, text)
        if previous is not None:
            yield partial(client.set_registered_model_alias, name, PREVIOUS, previous)
        elif PREVIOUS in there:
            yield partial(client.delete_registered_model_alias, name, PREVIOUS)
        if there.get(CHALLENGER) == number:
            yield partial(client.delete_registered_model_alias, name, CHALLENGER)
        yield partial(client.delete_model_version_tag, name, number, MOVE)

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


def _announced(text: str) -> tuple[str | None, dict[str, str]]:
    """The next `previous` and the verdicts per version of a move; raises an error of Python's for any other text."""
    move: dict[str, Any] = json.loads(text)
    previous, verdicts = move["previous"], {str(key): str(said) for key, said in move["verdicts"].items()}
    for number in verdicts if previous is None else (previous, *verdicts):
        if not re.fullmatch("[0-9]{1,9}", number):
            raise ValueError(f"{number!r} is no version")
        verdicts.get(number, "").encode()  # half a character is valid in JSON and in no database
    return previous, verdicts
