"""Aliases of a registered model, and their moves: champion, challenger, previous.

    promote     previous <- champion, champion <- VERSION           the files are checked first
    rollback    champion <- previous                                the bad version is tagged
    refuse      the version stays challenger, the reason is a tag

A reader of `models:/NAME@champion` sees the old or the new version, never none: the alias is moved by one
write, after `previous` has been set. What is about to happen is written down first, as the tag MOVING of the
registered model. If the mover dies between two writes, the next call does all of them again: they lead to the
same state however often they are repeated.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from olora_ray.common.errors import UserError
from olora_ray.tracking import checksums
from olora_ray.tracking.client import connect, is_unavailable, reachable
from olora_ray.tracking.version import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
GATE = "olora.gate"
"""Tag of a version: passed, refused, promoted or rolled back, and why."""
MOVING = "olora.moving"
ROLLED_BACK = "rolled back"


@dataclass(frozen=True)
class Move:
    """All that one move of the aliases writes."""

    champion: str
    """Version that becomes the champion."""
    previous: str | None
    """Version that becomes `previous`; None: there is none any more."""
    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Version -> tags it gets."""


class Aliases:
    """The aliases of one registered model.

    All methods raise UserError for a model or version that is not there, and TrackingUnavailable if MLflow does not
    answer.
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
            found = self._model()
            return {str(alias): str(version) for alias, version in found.aliases.items()} if found else {}

    def version(self, number: str) -> Version:
        """One version."""
        from mlflow.exceptions import MlflowException

        with reachable(self.uri):
            try:
                return Version.of(self.client.get_model_version(self.name, number))
            except MlflowException as error:
                if is_unavailable(error):
                    raise
                raise UserError(f"{self.name} has no version {number}; {self._there()}") from None

    def versions(self) -> list[Version]:
        """All versions, the oldest first; empty if there is no such model yet."""
        with reachable(self.uri):
            found: list[Version] = []
            token = None
            while True:
                page = self.client.search_model_versions(f"name = '{self.name}'", page_token=token)
                found.extend(map(Version.of, page))
                token = page.token
                if not token:
                    return sorted(found, key=lambda item: int(item.number))

    def verify(self, number: str) -> int:
        """Check a version's files against its checksums, return how many there are; raises UserError."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            place = str(self.client.get_model_version_download_uri(self.name, number))
            return checksums.verify(version, place, self.uri)

    def promote(self, number: str, why: str, tags: Mapping[str, str] | None = None) -> str | None:
        """Let a version become the champion if its files are whole; returns the version it takes over from."""
        self.repair()
        self.verify(number)
        before = self.current()
        old = before.get(CHAMPION)
        kept = before.get(PREVIOUS) if old == number else old
        self._move(Move(number, kept, {number: {**(tags or {}), GATE: why}}))
        return old if old != number else None

    def refuse(self, number: str, why: str, tags: Mapping[str, str] | None = None) -> None:
        """Let a version stay what it is, with the reason; the aliases do not move."""
        self.repair()
        with reachable(self.uri):
            for name, text in {**(tags or {}), GATE: why}.items():  # the verdict last: it makes the rest count
                self.client.set_model_version_tag(self.name, number, name, text)

    def rollback(self, why: str) -> tuple[str, str]:
        """Give `champion` back to the version before, if its files are whole; returns (bad version, good version)."""
        self.repair()
        there = self.current()
        bad, good = there.get(CHAMPION), there.get(PREVIOUS)
        if bad is None or good is None:
            named = "there is no champion" if bad is None else f"version {bad} is the first champion, or already back"
            raise UserError(f"{self.name}: nothing to roll back to: {named}; `promote` sets any version")
        self.verify(good)
        self._move(Move(good, None, {bad: {GATE: f"{ROLLED_BACK}: {why}"}}))
        return bad, good

    def repair(self) -> Move | None:
        """Finish a move that was cut off, if there is one; returns it."""
        with reachable(self.uri):
            found = self._model()
            if found is None or MOVING not in found.tags:
                return None
            move = Move(**json.loads(found.tags[MOVING]))
            self._write(move)
            return move

    def _move(self, move: Move) -> None:
        with reachable(self.uri):
            self.client.set_registered_model_tag(self.name, MOVING, json.dumps(asdict(move)))
            self._write(move)

    def _write(self, move: Move) -> None:
        """All writes of a move; any number of them may have been done before."""
        client, name = self.client, self.name
        for number, tags in move.tags.items():
            for key, text in tags.items():
                client.set_model_version_tag(name, number, key, text)
        if move.previous is not None:
            client.set_registered_model_alias(name, PREVIOUS, move.previous)
        client.set_registered_model_alias(name, CHAMPION, move.champion)
        there = client.get_registered_model(name).aliases
        if move.previous is None and PREVIOUS in there:
            client.delete_registered_model_alias(name, PREVIOUS)
        if str(there.get(CHALLENGER)) == move.champion:
            client.delete_registered_model_alias(name, CHALLENGER)
        client.delete_registered_model_tag(name, MOVING)

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
