"""Aliases of a registered model, and their moves: champion, challenger, previous.

    promote     previous <- champion, champion <- VERSION           the files are checked first
    rollback    champion <- previous                                the bad version is tagged
    refuse      the version stays challenger, the reason is a tag

A reader of `models:/NAME@champion` sees the old or the new version, never none: a single write moves the alias, and
that write is the move. Before it, the version that becomes the champion gets the tag MOVE, with the other writes of the
move. If the mover dies, the next call finds the tag at the champion and completes the move. At any other version the
tag is ignored: the move had not started, or the alias was moved again.

MLflow has no conditional write, and there is no lock. Each write of a decision follows a fresh read of the champion on
which the decision was based, so that two movers overtake each other only within the same request.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import StringConstraints

from olora_ray.common import records
from olora_ray.common.errors import UserError
from olora_ray.common.text import some
from olora_ray.config.schema import Config
from olora_ray.tracking import checksums
from olora_ray.tracking.checksums import GATE, JUDGED, ROLLED_BACK, Version, name_filter
from olora_ray.tracking.client import (
    check_uri,
    connect,
    existing,
    is_unavailable,
    reachable,
    shown_uri,
)
from olora_ray.tracking.start import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

logger = logging.getLogger(__name__)

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"
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
    """

    def __init__(self, tracking_uri: str, name: str, verify: str | None = None) -> None:
        self.uri = tracking_uri
        self.name = name
        self._key = verify
        """The public key by which versions must be signed."""

    @classmethod
    def of(cls, config: Config, name: str | None = None) -> "Aliases":
        """Return the aliases of the config's registered model, or of another one."""
        registry = config.registry
        return cls(resolve_uri(config), name or str(registry.model), registry.verify)

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
            model = self._model()
            last = None if model is None else model.tags.get(LAST)
            if self._now().get(CHAMPION) in (None, last):
                return last
            self._complete()
            champion = self._now().get(CHAMPION)
            if champion is None:
                return last
            self.client.set_registered_model_tag(self.name, LAST, champion)
            return champion

    def version(self, number: str) -> Version:
        with reachable(self.uri):
            return self._version(number)

    def exists(self) -> bool:
        """True if the model has a version."""
        with reachable(self.uri):
            return bool(self.client.search_model_versions(name_filter(self.name), max_results=1))

    def versions(self, run_id: str | None = None) -> list[Version]:
        """Return the versions, the oldest first; those of one MLflow run, if it is given."""
        wanted = name_filter(self.name)
        if run_id is not None:
            wanted += f" and run_id = '{run_id}'"
        with reachable(self.uri):
            versions: list[Version] = []
            token = None
            while True:
                page = self.client.search_model_versions(wanted, page_token=token)
                versions.extend(map(Version.of, page))
                token = page.token
                if not token:
                    return sorted(versions, key=lambda item: int(item.number))

    def tags(self) -> dict[str, str]:
        """Return the tags of the registered model; none if it is missing."""
        with reachable(self.uri):
            model = self._model()
        if model is None:
            return {}
        return dict(model.tags)

    def tag(self, name: str, text: str) -> None:
        with reachable(self.uri):
            self.client.set_registered_model_tag(self.name, name, text)

    def tag_version(self, number: str, name: str, text: str) -> None:
        with reachable(self.uri):
            self.client.set_model_version_tag(self.name, number, name, text)

    def champion_since(self, champion: Version) -> float:
        """Return when it became the champion, or when it was made if something else than this project moved the alias.

        In seconds since 1970.
        """
        number, _, moved = self.tags().get(SINCE, "").partition(" ")
        if number == champion.number:
            return float(moved)
        return champion.created

    def of_run(self, run_id: str) -> Version | None:
        """Return the version that an MLflow run registered under this name; None if it is missing or deleted."""
        return next(reversed(self.versions(run_id)), None)

    def files_uri(self, number: str) -> str:
        with reachable(self.uri, upload=True):
            return str(self.client.get_model_version_download_uri(self.name, number))

    def verify(self, number: str) -> int:
        """Check a version's files against its registration; return their number, or raise UserError."""
        version = self.version(number)
        with reachable(self.uri, upload=True):
            return checksums.verify(version, self.files_uri(number), self.uri)

    def refuse_unjudged(self, champion: Version) -> None:
        """Raise UserError if something else than this project made a version the champion that was not accepted.

        In a model whose champion this project has never moved, the alias belongs to others.
        """
        if champion.accepted or MOVE in champion.tags or SINCE not in self.tags():
            return
        raise UserError(
            f"{self.name}: the alias {CHAMPION} was set to version {champion.number}, which was not judged good"
            f" ({champion.verdict or 'no verdict'}); if it is, use: olora-ray registry promote {self.name}"
            f" {champion.number}"
        )

    def sign(self, number: str, key: str) -> None:
        version = self.version(number)
        with reachable(self.uri, upload=True):
            checksums.sign(version, self.files_uri(number), self.uri, key)
            self.client.set_model_version_tag(self.name, number, checksums.SIGNED, key)

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
        self.verify(number)
        check = partial(self._unchanged, number, instead_of)
        with reachable(self.uri):
            self._complete()
            self._record(number, tags or {}, check)
            aliases = self._now()
            replaced = aliases.get(CHAMPION, beaten)
            if replaced == number:
                replaced = None
            kept = replaced or aliases.get(PREVIOUS)
            if kept == number:
                kept = None
            self._move(number, kept, {number: why}, check)
            return replaced

    def refuse(
        self,
        number: str,
        why: str,
        tags: Mapping[str, str] | None = None,
        *,
        instead_of: str | None = None,
    ) -> None:
        """Write why a version stays challenger; no alias moves. Raise as `promote` does."""
        check = partial(self._unchanged, number, instead_of)
        with reachable(self.uri):
            self._complete()
            self._record(number, tags or {}, check)
            check()
            self.client.set_model_version_tag(self.name, number, GATE, why)

    def rollback(self, why: str) -> tuple[str, str]:
        """Move `champion` back to the previous version if its files are unchanged; return (bad, good) version."""
        self.repair()
        aliases = self.current()
        bad = aliases.get(CHAMPION)
        good = aliases.get(PREVIOUS)
        if bad is None or good is None or good == bad:
            cause = "there is no champion"
            if bad is not None:
                cause = f"version {bad} is the first champion, a rollback led to it, or"
                cause += " `previous` was deleted or is itself"
            raise UserError(
                f"{self.name}: nothing to roll back to: {cause}; choose a version with `promote`"
            )
        self.verify(good)
        verdicts = {bad: f"{ROLLED_BACK}: {why}"}
        if not self.version(
            good
        ).accepted:  # something else than this project had made it the champion
            verdicts[good] = f"champion again: {why}"

        def check() -> None:
            aliases = self._now()
            if (aliases.get(CHAMPION), aliases.get(PREVIOUS)) != (bad, good):
                raise UserError(
                    f"{self.name}: the champion was moved just now, from version {bad} to"
                    f" {aliases.get(CHAMPION, 'none')}; check with `list`, and roll back again if you still want it"
                )

        with reachable(self.uri):
            self._complete()
            self._record(good, {}, check)
            self._move(good, None, verdicts, check)
        return bad, good

    def repair(self) -> None:
        """Complete an interrupted move, if there is one."""
        with reachable(self.uri):
            self._complete()

    def _complete(self) -> None:
        number = self._now().get(CHAMPION)
        if number is None:
            return
        champion = self._version(number)
        if MOVE in champion.tags:
            self._finish(champion)

    def _unchanged(self, number: str, instead_of: str | None) -> None:
        """Raise Overtaken if the champion is not `instead_of`, or the version was promoted or rolled back by hand."""
        version = self._version(number)
        if instead_of is None:
            return
        champion = self._now().get(CHAMPION)
        if champion == number or version.rolled_back:
            raise Overtaken(f"version {number} was promoted or rolled back by hand meanwhile")
        if (champion or "") != instead_of:
            was = f"version {instead_of}" if instead_of else "none"
            now = f"version {champion}" if champion else "none"
            raise Overtaken(f"the champion was {was}, and is now {now}")

    def _record(self, number: str, tags: Mapping[str, str], check: Callable[[], None]) -> None:
        """Delete the old verdict, then write the evidence of the new one: evidence without a verdict is ignored.

        Raises UserError if the version was changed after an earlier verdict, or after the tag JUDGED among `tags`.
        """
        check()
        version = self._version(number)
        judged = tags.get(JUDGED, version.checksum)
        for digest in (version.judged, judged):
            version.refuse_changed(digest)
        for name in (GATE, MOVE):
            if tags and name in version.tags:
                check()
                self.client.delete_model_version_tag(self.name, number, name)
        for name, text in {**tags, JUDGED: judged}.items():
            check()
            self.client.set_model_version_tag(self.name, number, name, text)

    def _move(
        self,
        champion: str,
        previous: str | None,
        verdicts: Mapping[str, str],
        check: Callable[[], None],
    ) -> None:
        """Make a version the champion and another one `previous` (None: none); set the verdicts, version -> text."""
        announced = records.text_of(_Move(previous, dict(verdicts)))
        check()
        self.client.set_model_version_tag(self.name, champion, MOVE, announced)
        check()
        self.client.set_registered_model_alias(self.name, CHAMPION, champion)
        self._finish(self._version(champion))

    def _finish(self, champion: Version) -> None:
        """Do all writes of a move except the alias champion. Repeating them is safe.

        A mover who has set another champion meanwhile has finished this move first, so the rest of it is left out.
        """
        from mlflow.exceptions import MlflowException

        for write in self._rest(champion):
            if self._now().get(CHAMPION) != champion.number:
                return
            try:
                write()
            except MlflowException as error:  # a deleted version needs neither tag nor alias
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise

    def _rest(self, champion: Version) -> Iterator[Callable[[], object]]:
        client = self.client
        name = self.name
        number = champion.number
        aliases = self._now()
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
        if model is None:
            return {}
        return {str(alias): str(version) for alias, version in model.aliases.items()}

    def _version(self, number: str) -> Version:
        from mlflow.exceptions import MlflowException

        try:
            return Version.of(self.client.get_model_version(self.name, number), self._key)
        # OverflowError: a number too large for any database.
        except (MlflowException, OverflowError) as error:
            if is_unavailable(error):
                raise
            numbers = [item.number for item in self.versions()]
            there = f"it has {', '.join(numbers) or 'none'}"
            if not numbers and self._model() is None:
                there = f"no model {self.name!r} is registered in the tracking server"
            raise UserError(f"{self.name} has no version {number}; {there}") from None

    def _model(self) -> "RegisteredModel | None":
        return existing(self.client.get_registered_model, self.name)


_Number = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]


def registered(uri: str, name: str, verify: str | None = None) -> Aliases:
    """Return the aliases of a model; raise UserError if MLflow does not answer or has no version of it."""
    check_uri(uri)
    aliases = Aliases(uri, name, verify)
    if not name.strip() or not aliases.exists():
        with reachable(uri):
            others = [each.name for each in aliases.client.search_registered_models()]
        known = some(others) or "none"
        raise UserError(
            f"no model {name!r} with a version is registered in {shown_uri(uri)}; registered: {known}"
        )
    return aliases


@dataclass(frozen=True)
class _Move:  # the tag MOVE
    previous: _Number | None
    verdicts: dict[_Number, str]
