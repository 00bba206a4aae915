"""Aliases of a registered model, and their moves: champion, challenger, previous.

    promote     previous <- champion, champion <- VERSION           the files are checked first
    rollback    champion <- previous                                the bad version is tagged
    refuse      the version stays challenger, the reason is a tag

All three read and write under the model's lock, from the command line and from a retraining. A reader of
`models:/NAME@champion` sees the old or the new version, never none: a single write moves the alias, and that write is
the move. Before it, the version that becomes the champion gets the tag MOVE, with the other writes of the move. If the
mover dies, the next call finds the tag at the champion and completes the move. At any other version the tag is ignored:
the move had not started, or the alias was moved again.
"""

import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import StringConstraints

from olora_ray.common import records
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.tracking import checksums
from olora_ray.tracking.checksums import GATE, ROLLED_BACK, Version, name_filter
from olora_ray.tracking.client import connect, existing, is_unavailable, reachable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

logger = logging.getLogger(__name__)

# The lock of a registered model, for the seconds in which its aliases are read and moved. It lies in MLflow, because
# people and retrainings on several machines move the aliases without a common storage.

# Beginning of the name of a registered model's tag; the rest is the holder's own.
LOCK = "olora.lock."
# Seconds after which a holder stops writing, and seconds after which others remove its tag.
LEASE, STALE = 40.0, 80.0


class RegistryLock:
    """The lock of one registered model, taken by `held`.

    Each process that wants the lock sets a tag of the model. A process that then sees no other tag has the lock. MLflow
    has no conditional write, but if two processes set a tag, at least the second sees the tag of the first.
    """

    def __init__(self, client: "MlflowClient", name: str) -> None:
        self.client, self.name = client, name
        self._tag, self._set = "", 0.0

    def now(self) -> float:
        """Return seconds of a clock that also runs while this machine is suspended."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

    def pause(self) -> None:
        time.sleep(random.uniform(0.1, 0.5))

    def check(self) -> None:
        """Raise TryAgain if the lock was held for too long to write anything more; call it before each write."""
        if self.now() - self._set > LEASE:
            raise TryAgain(
                f"{self.name}: MLflow is too slow: moving an alias took over {LEASE:g} s; try again later"
            )

    def take(self) -> None:
        """Take the lock; raise TryAgain that names the holder, or UserError if the model does not exist."""
        end, first_seen = self.now() + 2 * STALE, dict[str, float]()
        while others := self._try():
            for tag in others:
                if (
                    self.now() - first_seen.setdefault(tag, self.now()) > STALE
                ):  # the holder has stopped writing
                    self.client.delete_registered_model_tag(self.name, tag)
            if self.now() > end:
                owner = others[min(others)]
                raise TryAgain(
                    f"{self.name}: its aliases are being moved by {owner}; try again later"
                )
            self.pause()

    def _try(self) -> dict[str, str]:
        """Set the own tag; return the tags of others. If there are any, the own tag is removed again."""
        self._set, self._tag = self.now(), f"{LOCK}{uuid.uuid4().hex}"
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        try:
            self.client.set_registered_model_tag(self.name, self._tag, owner)
            tags = self.client.get_registered_model(self.name).tags
        except BaseException:
            self.release()
            raise
        others = {tag: text for tag, text in tags.items() if tag.startswith(LOCK)}
        if others.pop(self._tag, None) is None:  # MLflow took longer than STALE
            others[self._tag] = owner
        if others:
            self.release()
        return others

    def release(self) -> None:
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
# Tag of a version while it becomes the champion: the other writes of that move.
MOVE = "olora.move"
# Tag of a registered model: the latest champion. It stays when the alias or the version is deleted.
LAST = "olora.last_champion"
# Tag of a registered model: the latest champion that this project has set, and when (seconds since 1970).
SINCE = "olora.champion_since"


class Overtaken(Exception):
    """The registry has changed since the decision was made."""


class Aliases:
    """The aliases of one registered model.

    All methods raise UserError for a missing model or version, and TrackingUnavailable if MLflow does not answer.
    Methods that write raise TryAgain if others hold the model's lock for minutes.
    """

    lock: ClassVar[type[RegistryLock]] = RegistryLock

    def __init__(self, tracking_uri: str, name: str) -> None:
        self.uri, self.name = tracking_uri, name

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client; use it inside `reachable(aliases.uri)`."""
        return connect(self.uri)

    def current(self) -> dict[str, str]:
        with reachable(self.uri):
            return self._now()

    def last_champion(self) -> str | None:
        """Return the champion, or the latest one if the alias was deleted; record one that was set by hand."""
        with reachable(self.uri):
            model, champion = self._model(), self._now().get(CHAMPION)
            last = None if model is None else model.tags.get(LAST)
        if champion is None or champion == last:
            return last
        with self._locked() as lock:
            if champion := self._now().get(CHAMPION):
                lock.check()
                self.client.set_registered_model_tag(self.name, LAST, champion)
            return champion or last

    def version(self, number: str) -> Version:
        with reachable(self.uri):
            return self._version(number)

    def versions(self) -> list[Version]:
        with reachable(self.uri):
            versions: list[Version] = []
            token = None
            while True:
                page = self.client.search_model_versions(name_filter(self.name), page_token=token)
                versions.extend(map(Version.of, page))
                token = page.token
                if not token:
                    return sorted(versions, key=lambda item: int(item.number))

    def of_run(self, run_id: str) -> Version | None:
        """Return the version that an MLflow run registered under this name; None if it is missing or deleted."""
        return next((each for each in reversed(self.versions()) if each.run_id == run_id), None)

    def files_uri(self, number: str) -> str:
        with reachable(self.uri, upload=True):
            return str(self.client.get_model_version_download_uri(self.name, number))

    def verify(self, number: str) -> int:
        """Check a version's files against its registration; return their number, or raise UserError."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            return checksums.verify(version, self.files_uri(number), self.uri)

    def sign(self, number: str, key: str) -> None:
        version = self.version(number)
        with reachable(self.uri, upload=True):
            checksums.sign(version, self.files_uri(number), self.uri, key)
            self.client.set_model_version_tag(self.name, number, checksums.SIGNED, key)

    def verify_signature(self, number: str, key: str) -> int:
        version = self.version(number)
        with reachable(self.uri, upload=True):
            return checksums.verify_signature(version, self.files_uri(number), self.uri, key)

    def verify_copy(self, number: str, folder: Path) -> None:
        """Check that a local folder is a copy of a version's merged model; raise UserError if it is not."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            checksums.verify_copy(version, self.files_uri(number), self.uri, folder)

    def promote(
        self,
        number: str,
        why: str,
        tags: Mapping[str, str] | None = None,
        *,
        instead_of: str | None = None,
        beaten: str | None = None,
    ) -> str | None:
        """Make a version the champion if its files are unchanged; return the version that it replaces.

        `instead_of` is the champion on which the decision was based ("" for none); None: any. Raises Overtaken if the
        champion has changed, or if the version itself was promoted or rolled back meanwhile. If there is no champion,
        `beaten` becomes `previous`; without `beaten`, `previous` stays.
        """
        self.verify(number)  # before taking the lock, because it may take minutes
        with self._locked() as lock:
            self._unchanged(number, instead_of)
            self._record(lock, number, tags or {})
            aliases = self._now()
            old = aliases.get(CHAMPION, beaten)
            kept = aliases.get(PREVIOUS) if old in (None, number) else old
            self._move(lock, number, kept if kept != number else None, {number: why})
            return old if old != number else None

    def refuse(
        self,
        number: str,
        why: str,
        tags: Mapping[str, str] | None = None,
        *,
        instead_of: str | None = None,
    ) -> None:
        """Write why a version stays challenger; no alias moves. Raise as `promote` does."""
        with self._locked() as lock:
            self._unchanged(number, instead_of)
            self._record(lock, number, tags or {})
            lock.check()
            self.client.set_model_version_tag(self.name, number, GATE, why)

    def rollback(self, why: str) -> tuple[str, str]:
        """Move `champion` back to the previous version if its files are unchanged; return (bad, good) version."""
        self.repair()
        aliases = self.current()
        bad, good = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if bad is None or good is None or good == bad:
            first = f"version {bad} is the first champion, a rollback led to it, or `previous` was deleted or is itself"
            why = "there is no champion" if bad is None else first
            raise UserError(
                f"{self.name}: nothing to roll back to: {why}; choose a version with `promote`"
            )
        self.verify(good)
        with self._locked() as lock:
            aliases = self._now()
            if (aliases.get(CHAMPION), aliases.get(PREVIOUS)) != (bad, good):
                raise UserError(
                    f"{self.name}: the champion was moved just now, from version {bad} to"
                    f" {aliases.get(CHAMPION, 'none')}; check with `list`, and roll back again if you still want it"
                )
            self._move(lock, good, None, {bad: f"{ROLLED_BACK}: {why}"})
        return bad, good

    def repair(self) -> None:
        """Complete an interrupted move, if there is one."""
        with reachable(self.uri):
            if self._cut_off() is not None:
                with self._locked():
                    pass

    @contextmanager
    def _locked(self) -> Iterator[RegistryLock]:
        """Hold the model's lock; complete an interrupted move of an earlier holder first."""
        with reachable(self.uri), held(self.lock(self.client, self.name)) as lock:
            if (champion := self._cut_off()) is not None:
                self._finish(lock, champion)
            yield lock

    def _cut_off(self) -> Version | None:
        champion = self._now().get(CHAMPION)
        version = None if champion is None else self._version(champion)
        return version if version is not None and MOVE in version.tags else None

    def _unchanged(self, number: str, instead_of: str | None) -> None:
        """Raise Overtaken if the champion is not `instead_of`, or the version was promoted or rolled back by hand."""
        version, champion = self._version(number), self._now().get(CHAMPION)
        if instead_of is None:
            return
        if champion == number or version.rolled_back:
            raise Overtaken(f"version {number} was promoted or rolled back by hand meanwhile")
        if (champion or "") != instead_of:
            was = f"version {instead_of}" if instead_of else "none"
            raise Overtaken(
                f"the champion was {was}, and is now {f'version {champion}' if champion else 'none'}"
            )

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

    def _move(
        self, lock: RegistryLock, champion: str, previous: str | None, verdicts: Mapping[str, str]
    ) -> None:
        """Make a version the champion and another one `previous` (None: none); set the verdicts, version -> text."""
        announced = records.text_of(_Move(previous, dict(verdicts)))
        lock.check()
        self.client.set_model_version_tag(self.name, champion, MOVE, announced)
        lock.check()
        self.client.set_registered_model_alias(self.name, CHAMPION, champion)
        self._finish(lock, self._version(champion))

    def _finish(self, lock: RegistryLock, champion: Version) -> None:
        """Do all writes of a move except the alias champion. Repeating them is safe."""
        from mlflow.exceptions import MlflowException

        for write in self._rest(champion):
            lock.check()
            try:
                write()
            except MlflowException as error:  # a deleted version needs neither tag nor alias
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise

    def _rest(self, champion: Version) -> Iterator[Callable[[], object]]:
        client, name, number, aliases = self.client, self.name, champion.number, self._now()
        yield partial(client.set_registered_model_tag, name, LAST, number)
        yield partial(client.set_registered_model_tag, name, SINCE, f"{number} {time.time():.0f}")
        move = records.parsed(champion.tags.get(MOVE, ""), _Move)
        if move is None:
            logger.warning(
                f"registry: {name} version {number}: the tag {MOVE} cannot be read and is removed"
            )
            move = _Move(aliases.get(PREVIOUS), {})
        for version, text in move.verdicts.items():
            yield partial(client.set_model_version_tag, name, version, GATE, text)
        if move.previous is not None:
            yield partial(client.set_registered_model_alias, name, PREVIOUS, move.previous)
        elif PREVIOUS in aliases:
            yield partial(client.delete_registered_model_alias, name, PREVIOUS)
        if aliases.get(CHALLENGER) == number:
            yield partial(client.delete_registered_model_alias, name, CHALLENGER)
        yield partial(client.delete_model_version_tag, name, number, MOVE)

    def _now(self) -> dict[str, str]:
        model = self._model()
        return (
            {str(alias): str(version) for alias, version in model.aliases.items()} if model else {}
        )

    def _version(self, number: str) -> Version:
        from mlflow.exceptions import MlflowException

        try:
            return Version.of(self.client.get_model_version(self.name, number))
        except (
            MlflowException,
            OverflowError,
        ) as error:  # OverflowError: a number too large for any database
            if is_unavailable(error):
                raise
            raise UserError(f"{self.name} has no version {number}; {self._there()}") from None

    def _model(self) -> "RegisteredModel | None":
        return existing(self.client.get_registered_model, self.name)

    def _there(self) -> str:
        versions = [item.number for item in self.versions()]
        if not versions and self._model() is None:
            return f"no model {self.name!r} is registered in the tracking server"
        return f"it has {', '.join(versions) or 'none'}"


_Number = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]


@dataclass(frozen=True)
class _Move:  # the tag MOVE
    previous: _Number | None
    verdicts: dict[_Number, str]
