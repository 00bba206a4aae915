"""A token store that is read while it is written.

Shards are built in order, and the first ones exist long before the last. So a first run trains on them, and waits for
each further shard when it needs it. What is read of the first shards does not depend on when the others arrive.
"""

import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from olora_ray.tokens.manifest import (
    Manifest,
    Outline,
    ShardInfo,
    file_size,
    read_manifest,
    read_sidecar,
    shard_name,
)
from olora_ray.tokens.store import Front, TokenStore, wrong_size

logger = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds between two looks for a shard."""
LOOKS = 30
"""Looks from one line about a wait to the next; there is none about a wait of a second."""


class Arrival(TokenStore):
    """A store of which any part may exist, or nothing. `has` and `wait` look for more. Threads may share it."""

    def __init__(
        self,
        uri: str,
        outline: Outline,
        shards: tuple[ShardInfo, ...] = (),
        manifest: Manifest | None = None,
    ) -> None:
        super().__init__(uri, outline, shards, manifest)
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """The manifest; looks for it, and raises UserError if the store is not complete."""
        self.look()
        return super().manifest

    def has(self, sequences: int) -> bool:
        """Return True if so many sequences have arrived, or the whole of a shorter store; looks for new shards."""
        if not super().has(sequences):
            self.look()
        return super().has(sequences)

    def wait(self, sequences: int) -> int:
        """Wait until `has(sequences)`; return how many have arrived.

        The driver ends workers that wait for the shards of a preparation that has failed.
        """
        for looks in itertools.count(1):
            if self.has(sequences):
                break
            if looks % LOOKS == 3:
                arrived = len(self.front.shards)
                logger.info(
                    f"waiting for shard {arrived + 1} of {self.shard_count} of the token store"
                )
            time.sleep(PAUSE)
        return len(self)

    def look(self) -> None:
        """Look for the manifest and for more shards; two requests to the storage when there is nothing new.

        A new shard costs two or three requests, of which many run at the same time.
        """
        with self._lock:
            manifest = read_manifest(self.uri) if self._manifest is None else None
            # A store under repair has a manifest that its shards do not match yet.
            if (
                manifest
                and manifest.digest == self.digest
                and len(manifest.shards) == self.shard_count
                and not wrong_size(self.uri, manifest)
            ):
                self.front = Front(manifest.shards)
                self._manifest = manifest
            width = 1
            while self._manifest is None:
                infos = self._next_shards(width)
                self.front = Front((*self.front.shards, *infos))
                if len(infos) < width:
                    break
                width = min(2 * width, 32)

    def _next_shards(self, width: int) -> list[ShardInfo]:
        first = len(self.front.shards)
        numbers = range(first, min(first + width, self.shard_count))
        infos = []
        with ThreadPoolExecutor(width) as pool:
            for info in pool.map(self._shard_info, numbers):
                if info is None:
                    break
                infos.append(info)
        return infos

    def _shard_info(self, number: int) -> ShardInfo | None:
        sidecar = read_sidecar(self.uri, number)
        if sidecar is None or file_size(self.uri, shard_name(number)) != sidecar["bytes"]:
            return None
        return ShardInfo.of(sidecar)
