"""The adapter that NAME@ALIAS or NAME@VERSION stands for in MLflow, as checked files on this machine.

`Watch.look` is called again and again. A moved alias is one request to MLflow; the files of its version are then copied
once, and compared with their SHA-256. While MLflow is unreachable, or if a version is refused, the adapter stays the
one before. A process that starts while MLflow is unreachable takes the last one from the cache, and checks its files.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, first_line
from olora_ray.model import folder
from olora_ray.tracking import checksums, models
from olora_ray.tracking.checksums import Version
from olora_ray.tracking.models import BaseOfAdapter

logger = logging.getLogger(__name__)

# Two looks, the copy of some megabytes and the loading take less than five seconds.
SECONDS = 2.0
# Seconds after which a refused version is tried again.
REST = 60.0
CACHE = Path(node_cache.CACHE) / "adapters"


@dataclass(frozen=True)
class Adapter:
    version: Version
    base: BaseOfAdapter
    folder: Path
    """The adapter in PEFT's format, with its tokenizer; each version has its own folder, which never changes."""

    @property
    def id(self) -> int:
        """Return a positive number of 31 bits, the same in all processes and for all names of the version."""
        return int(self.version.checksum[:8], 16) & 0x7FFFFFFF or 1

    @property
    def name(self) -> str:
        return f"{self.version.name}@{self.version.number}"

    @property
    def engine_name(self) -> str:
        """The name for an engine that may cache by names: it never stands for two adapters."""
        return f"{self.name}-{self.version.checksum[:8]}"

    def __str__(self) -> str:
        return f"version {self.version.number}"

    def check_base(self, name: str, revision: str | None = None) -> None:
        """Raise UserError if an engine's model `name`, a folder or a hub id, is not the base of this adapter."""
        from huggingface_hub import snapshot_download

        place = Path(name)
        if not place.is_dir():
            failure = f"the engine's base model {name} is not on this machine"
            with as_user_error(failure, OSError, ValueError):
                place = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if not folder.has_weights(place, self.base.digest):
            raise UserError(
                f"{self}: the engine's base model {place} has other weights than its own, {self.base.name}"
            )


class Attempts:
    """Work that is attempted again and again: logs each new reason of a failure once, and `again` when it succeeds."""

    def __init__(self, about: str, again: str = "") -> None:
        self._about = about
        self._again = again
        self._said = ""
        self._refused: dict[str, float] = {}

    def resting(self, what: str) -> bool:
        """True if this was refused less than REST seconds ago."""
        return time.monotonic() - self._refused.get(what, -REST) < REST

    @contextmanager
    def attempt(self, what: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the engine must keep its adapter, whatever MLflow, a store or an engine answers
            if what and not isinstance(error, TryAgain | OSError):
                self._refused[what] = time.monotonic()
            reason = first_line(error).removeprefix("model.name: ")
            if reason != self._said:
                expected = isinstance(error, UserError | OSError)
                logger.error(f"{self._about}: {reason}", exc_info=None if expected else error)
            self._said = reason
        else:
            if self._said and self._again:
                logger.info(self._again)
            self._said = ""


class Watch:
    def __init__(
        self, name: str, tracking_uri: str, cache: Path = CACHE, verify: str | None = None
    ) -> None:
        uri = models.uri_of(name)
        if not uri:
            raise UserError(f"{name}: expected NAME@ALIAS or NAME@VERSION of a registered model")
        self.name = name
        self.is_alias = "@" in uri
        self._uri = uri
        self._tracking_uri = tracking_uri
        self._cache = cache
        self._verify = verify
        self._record = str(cache / f".{storage.digest(tracking_uri, name, length=16)}.json")
        self._asking = Attempts(name, f"{name}: MLflow names a version again")
        self._fetching = Attempts(name)
        self.current: Adapter | None = None
        """The adapter that the last look found; None if none could be loaded since the start."""
        self.answered = time.time()
        """The time of MLflow's last answer."""
        self.away = True
        """True until MLflow answers, and while it does not."""
        self.recalled = False
        """True if the current adapter is from the cache, and MLflow has not yet named it."""
        self.meant = ""
        """The NAME@NUMBER of that answer."""

    def look(self) -> Adapter | None:
        """Return the current adapter, after a question to MLflow. Log what is wrong."""
        with self._asking.attempt():
            try:
                version = models.resolve(self._uri, self._tracking_uri, self._verify)
            except Exception as error:
                self.away = isinstance(error, TryAgain)
                self.recall()
                raise
            self.away = False
            self.answered = time.time()
            self.meant = f"{version.name}@{version.number}"
            key = f"{version.number} {version.checksum}"
            current = self.current
            if current and key == f"{current.version.number} {current.version.checksum}":
                self.recalled = False
                node_cache.used(current.folder.parent)
            elif not self._fetching.resting(key):
                with self._fetching.attempt(key):
                    self.current = self._fetched(version)
                    self.recalled = False
        return self.current

    def recall(self) -> None:
        """Without MLflow and without a current adapter: take the one of the last process from the cache."""
        if not self.away or self.current:
            return
        with self._fetching.attempt():
            kept = records.read(self._record, Adapter)
            if kept:
                # The last process may have needed another signature.
                version = replace(kept.version, key=checksums.needed(self._verify))
                kept = replace(kept, version=version)
                checksums.verify(version, str(kept.folder.parent), self._tracking_uri)
                self.recalled = True
                self.current = kept
                logger.warning(
                    f"{self.name}: MLflow does not answer; {kept} is what it named last, and is used from the cache"
                )

    def _fetched(self, version: Version) -> Adapter:
        if not version.adapter_only or not version.checksum:
            raise UserError(
                f"{version.name} version {version.number} is not an adapter that this project registered, and engines"
                " load adapters; train with export.merged: false"
            )
        found = models.fetch(version, self._tracking_uri, self._cache, copy=True)
        assert found.base
        kept = (each for each in self._cache.iterdir() if not each.name.startswith("."))
        node_cache.make_room(self._cache, kept)
        adapter = Adapter(version, found.base, found.folder)
        records.write(self._record, {**asdict(adapter), "folder": str(found.folder)})
        return adapter
