"""The token store: packed sequences on disk, named by the digest of their inputs, and read by number.

    <storage>/tokens/<digest>/
        shard-00000.arrow    packs, one row each (see shard.SCHEMA); memory-mapped
        shard-00000.json     written after it: the shard is done
        manifest.json        written last: the store is complete
        rejected.jsonl       the rows that could not be used, with the reason

A store can be read while it grows: shards are built in order, and the first ones exist long before the
last. Reading needs neither Ray nor the tokenizer.
"""

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_file
from olora_ray.tokens.manifest import (
    Manifest,
    Outline,
    ShardInfo,
    file_size,
    origin_name,
    read_manifest,
    read_sidecar,
    shard_name,
)
from olora_ray.tokens.plan import Counts, Pack, key, permute_at


@dataclass(frozen=True)
class Front:
    """The known shards at the start of a store; replaced as one object, because threads read it meanwhile."""

    shards: tuple[ShardInfo, ...]

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(shards + 1,) sequences before each shard, and in all."""
        return np.cumsum([0, *(shard.packs for shard in self.shards)], dtype=np.int64)


# The order of a training over the sequences of a store: a function of the seed and the position, without state.


Places = NDArray[np.int64]


def order(num_packs: int, seed: int, start: int, stop: int) -> Places:
    """Return the sequences start..stop-1 of the endless order over a store, (stop - start,).

    Any range costs only its own length.
    """
    epoch, position = np.divmod(np.arange(start, stop, dtype=np.int64), num_packs)
    for number in np.unique(epoch[epoch > 0]):
        inside = epoch == number
        position[inside] = permute_at(position[inside], num_packs, key("order", seed, number))
    return position


# Files of a store's shards on this node: fetched if the store is not local, verified, and mapped into memory.


MAPPED_SHARDS = 512
"""Shards that a process keeps mapped; each takes an open file."""


class ShardFiles:
    def __init__(self, uri: str, digest: str) -> None:
        self.uri, self.digest = uri, digest
        # Shards that this process has hashed.
        self._verified = set[int]()

    def open(self, number: int, info: ShardInfo) -> Any:
        """Return the shard, mapped into memory; raise UserError if it is missing or differs from `info`."""
        try:
            path = self._local(number, info)
            intact = number in self._verified or digest_file(path) == info.sha256
            # This node's copy may be damaged while the store's file is good: fetch it once more before giving up.
            if not intact and storage.is_uri(self.uri):
                path = self._local(number, info, again=True)
                intact = digest_file(path) == info.sha256
        except FileNotFoundError:
            raise UserError(
                f"token store {self.uri}: {shard_name(number)} is missing (does every node see this folder?)"
            ) from None
        if not intact:
            raise UserError(
                f"token store {self.uri}: {shard_name(number)} is damaged; delete it, then run the same command again"
            )
        self._verified.add(number)
        batch = ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        if batch.num_rows != info.packs:
            raise UserError(
                f"token store {self.uri}: {shard_name(number)} does not match its manifest.json"
            )
        return batch

    def _local(self, number: int, info: ShardInfo, again: bool = False) -> Path:
        """Return the shard as a local file; a remote one is downloaded once for all processes of the node."""
        uri = storage.join(self.uri, shard_name(number))
        if not storage.is_uri(uri):
            return Path(uri)
        root = storage.private_folder("olora_ray") / "tokens"
        path = root / self.digest / shard_name(number)

        def fetch(partial: Path) -> None:
            partial.write_bytes(storage.read_bytes(uri))
            node_cache.make_room(root, root.glob("*/*.arrow"))

        if again or (path.exists() and path.stat().st_size != info.bytes):
            self._verified.discard(number)
            path.unlink(missing_ok=True)
        return node_cache.cached(path, fetch)


class TokenStore:
    """A store, read by the number of the sequence; created by `open` or `growing`.

    Of a growing store the sequences of the first shards are known, and `refresh` looks for more. It pickles as its
    address and what is known. Threads may share it.
    """

    def __init__(
        self,
        uri: str,
        outline: Outline,
        shards: tuple[ShardInfo, ...] = (),
        manifest: Manifest | None = None,
    ) -> None:
        """Use `open` or `growing`; `shards` are the known ones at the front."""
        self.uri, self.digest, self.shard_count = uri, outline.digest, outline.shards
        self.max_length, self.files = outline.max_length, outline.files
        self._outline, self._manifest = outline, manifest
        self._known = Front(manifest.shards if manifest else shards)
        self._lock = threading.Lock()
        self._files = ShardFiles(uri, outline.digest)
        self._map = lru_cache(MAPPED_SHARDS)(self._opened)

    @classmethod
    def open(cls, uri: str) -> "TokenStore":
        """Open a complete store; raise UserError if it is incomplete, or a shard's size is not the manifest's."""
        if (manifest := read_manifest(uri)) is None:
            raise UserError(
                f"token store {uri}: missing or incomplete, or its manifest.json is damaged; run the same command again"
                " to rebuild it"
            )
        if problem := _wrong_size(uri, manifest):
            raise UserError(
                f"token store {uri}: {problem}; run the same command again to rebuild it"
            )
        return cls(uri, manifest.outline(), (), manifest)

    @classmethod
    def growing(cls, uri: str, outline: Outline) -> "TokenStore":
        """Open a store of which any part may exist, or nothing."""
        store = cls(uri, outline)
        store.refresh()
        return store

    def __reduce__(self) -> tuple[Callable[..., "TokenStore"], tuple[Any, ...]]:
        # Memory maps do not travel: shards are mapped again on arrival.
        shards = () if self._manifest else self._known.shards
        return TokenStore, (self.uri, self._outline, shards, self._manifest)

    @property
    def complete(self) -> bool:
        """True if the manifest existed at the last `refresh`."""
        return self._manifest is not None

    @property
    def available_shards(self) -> int:
        """Number of shards at the front that existed at the last `refresh`."""
        return len(self._known.shards)

    @property
    def available(self) -> int:
        return int(self._known.ends[-1])

    @property
    def total(self) -> int | None:
        """Number of sequences of the store; None while shards are missing."""
        known = self._known
        return int(known.ends[-1]) if len(known.shards) == self.shard_count else None

    @property
    def manifest(self) -> Manifest:
        """The manifest; looks for it, and raises UserError if the store is not complete."""
        self.refresh()
        if self._manifest is None:
            raise UserError(
                f"token store {self.uri}: incomplete; run the same command again to complete it"
            )
        return self._manifest

    def refresh(self) -> None:
        """Look for the manifest and for more shards; two requests to the storage when there is nothing new.

        A new shard costs two or three requests, of which many run at the same time.
        """
        with self._lock:
            if self._manifest is None and (manifest := self._found_manifest()):
                self._known, self._manifest = Front(manifest.shards), manifest
            found_all, width = self._manifest is not None, 1
            while not found_all:
                infos = self._next_shards(width)
                self._known = Front((*self._known.shards, *infos))
                found_all, width = len(infos) < width, min(2 * width, 32)

    def order(self, seed: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sequences start..stop-1 of the endless training order, (stop - start,).

        Any range costs about its own length. While shards are missing only the first pass is known.
        """
        if self.total is None:
            return np.arange(start, stop, dtype=np.int64)
        return order(self.total, seed, start, stop)

    def _opened(self, number: int) -> Any:
        return self._files.open(number, self._known.shards[number])

    def __len__(self) -> int:
        assert self.total is not None, "a growing store has no length yet"
        return self.total

    def __getitem__(self, index: int) -> Pack:
        """Return sequence `index`, 0 <= index < available; a copy, so that it may be changed."""
        batch, row = self._find(index)
        return Pack(
            input_ids=_slice(batch, "input_ids", row).to_numpy().copy(),
            supervised=_slice(batch, "supervised", row).to_numpy(zero_copy_only=False),
            segments=tuple(_slice(batch, "segments", row).to_pylist()),
        )

    def counts(self, indices: Iterable[int]) -> Counts:
        """Return the size of these sequences together; reads none of their tokens."""
        total = Counts()
        for index in indices:
            batch, row = self._find(int(index))
            total += Counts(
                tokens=len(_slice(batch, "input_ids", row)),
                examples=len(_slice(batch, "segments", row)),
                supervised=batch.column("supervised_count")[row].as_py(),
            )
        return total

    def origins(self, index: int) -> list[str]:
        """Return the origins of a sequence's examples as file:line (a row number if there are no lines)."""
        batch, row = self._find(index)
        return [
            origin_name(self.files, origin) for origin in _slice(batch, "origin", row).to_pylist()
        ]

    def locate(self, index: int) -> tuple[int, int, int]:
        """Return the number of the shard of sequence `index`, its position in it, and the sequences of the shard."""
        known = self._known  # read once, because `refresh` in another thread may replace it
        if not 0 <= index < known.ends[-1]:
            raise IndexError(f"sequence {index} of {known.ends[-1]}")
        number = int(np.searchsorted(known.ends, index, side="right")) - 1
        return number, int(index - known.ends[number]), known.shards[number].packs

    def _find(self, index: int) -> tuple[Any, int]:
        number, row, _ = self.locate(index)
        return self._map(number), row

    def _found_manifest(self) -> Manifest | None:
        """Return the manifest if the store matches it; a store under repair counts as growing."""
        manifest = read_manifest(self.uri)
        fits = (
            manifest and manifest.digest == self.digest and len(manifest.shards) == self.shard_count
        )
        return manifest if manifest and fits and not _wrong_size(self.uri, manifest) else None

    def _next_shards(self, width: int) -> list[ShardInfo]:
        front = self.available_shards
        numbers = range(front, min(front + width, self.shard_count))
        with ThreadPoolExecutor(width) as pool:
            infos = list(pool.map(self._shard_info, numbers))
        return [info for info in itertools.takewhile(lambda info: info is not None, infos) if info]

    def _shard_info(self, number: int) -> ShardInfo | None:
        sidecar = read_sidecar(self.uri, number)
        if sidecar is None or file_size(self.uri, shard_name(number)) != sidecar["bytes"]:
            return None
        return ShardInfo.of(sidecar)


def _wrong_size(uri: str, wanted: Manifest) -> str | None:
    sizes = storage.files_below(uri)
    for number, shard in enumerate(wanted.shards):
        size = sizes.get(shard_name(number))
        if size is None:
            return f"{shard_name(number)} is missing (does every node see this folder?)"
        if size != shard.bytes:
            return f"{shard_name(number)} has {size} bytes instead of {shard.bytes}"
    return None


def _slice(batch: Any, column: str, row: int) -> Any:
    lists = batch.column(column)
    start, stop = lists.offsets[row].as_py(), lists.offsets[row + 1].as_py()
    return lists.values.slice(start, stop - start)
