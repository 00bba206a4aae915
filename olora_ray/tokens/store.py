"""The token store: packed sequences on disk, named by the digest of their inputs, and read by number.

    <storage>/tokens/<digest>/
        shard-00000.arrow    packs, one row each (see shard.SCHEMA); memory-mapped
        shard-00000.json     written after it: the shard is done
        manifest.json        written last: the store is complete
        rejected.jsonl       the rows that could not be used, with the reason

Reading needs neither Ray nor the tokenizer. A store that is still being written is an `Arrival` (tokens/arrival.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    origin_name,
    read_manifest,
    shard_name,
)
from olora_ray.tokens.plan import ROLES, Counts, Pack, key, permute_at


@dataclass(frozen=True)
class Front:
    """The known shards at the start of a store; replaced as one object, because threads read it meanwhile."""

    shards: tuple[ShardInfo, ...]

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(shards + 1,) sequences before each shard, and in all."""
        return np.cumsum([0, *(shard.packs for shard in self.shards)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])


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
        self.uri = uri
        self.digest = digest
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
    """A store, read by the number of the sequence. Threads may share it.

    Its length is the number of known sequences: all, except of an `Arrival` (tokens/arrival.py).
    """

    def __init__(
        self,
        uri: str,
        outline: Outline,
        shards: tuple[ShardInfo, ...],
        manifest: Manifest | None,
    ) -> None:
        """Use `open` instead; `shards` are the known ones at the front."""
        self.uri = uri
        self.digest = outline.digest
        self.shard_count = outline.shards
        self.max_length = outline.max_length
        self.files = outline.files
        self.front = Front(shards)
        self.reference: Sequence[tuple[float, ...]] = ()
        """`Pack.reference` of each sequence, once it has been measured (train/reference.py)."""
        self._outline = outline
        self._manifest = manifest
        self._files = ShardFiles(uri, outline.digest)
        self._map = lru_cache(MAPPED_SHARDS)(self._opened)

    @classmethod
    def open(cls, uri: str) -> "TokenStore":
        """Open a complete store; raise UserError if it is incomplete, or a shard's size is not the manifest's."""
        manifest = read_manifest(uri)
        if manifest is None:
            raise UserError(
                f"token store {uri}: missing or incomplete, or its manifest.json is damaged; run the same command again"
                " to rebuild it"
            )
        problem = wrong_size(uri, manifest)
        if problem:
            raise UserError(
                f"token store {uri}: {problem}; run the same command again to rebuild it"
            )
        return TokenStore(uri, manifest.outline(), manifest.shards, manifest)

    def __reduce__(self) -> tuple[Callable[..., "TokenStore"], tuple[Any, ...]]:
        # Memory maps do not travel: each process maps the shards again.
        return type(self), (self.uri, self._outline, self.front.shards, self._manifest)

    @property
    def complete(self) -> bool:
        """True if the manifest is known."""
        return self._manifest is not None

    @property
    def manifest(self) -> Manifest:
        """The manifest; raises UserError if the store is not complete."""
        if self._manifest is None:
            raise UserError(
                f"token store {self.uri}: incomplete; run the same command again to complete it"
            )
        return self._manifest

    @property
    def total(self) -> int | None:
        """Number of sequences of the store; None while shards are missing."""
        front = self.front
        return len(front) if len(front.shards) == self.shard_count else None

    def has(self, sequences: int) -> bool:
        """Return True if so many sequences are known, or the whole of a shorter store."""
        return self.total is not None or sequences <= len(self)

    def wait(self, sequences: int) -> int:
        """Return the number of sequences; an `Arrival` first waits until `has(sequences)`."""
        return len(self)

    def order(self, seed: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sequences start..stop-1 of the endless training order, (stop - start,).

        Any range costs about its own length. While shards are missing only the first pass is known.
        """
        total = self.total
        if total is None:
            return np.arange(start, stop, dtype=np.int64)
        return order(total, seed, start, stop)

    def _opened(self, number: int) -> Any:
        return self._files.open(number, self.front.shards[number])

    def __len__(self) -> int:
        return len(self.front)

    def __getitem__(self, index: int) -> Pack:
        """Return sequence `index`, 0 <= index < len; a copy, so that it may be changed."""
        batch, row = self._find(index)
        pack = Pack(
            input_ids=_slice(batch, "input_ids", row).to_numpy().copy(),
            supervised=_slice(batch, "supervised", row).to_numpy(zero_copy_only=False),
            segments=tuple(_slice(batch, "segments", row).to_pylist()),
        )
        if ROLES in batch.schema.names:
            pack = replace(pack, roles=tuple(_slice(batch, ROLES, row).to_pylist()))
        if self.reference:
            pack = replace(pack, reference=self.reference[index])
        return pack

    @property
    def has_pairs(self) -> bool:
        """True if some of its examples are pairs; waits for the first sequence."""
        self.wait(1)
        return ROLES in self._map(0).schema.names

    def counts(self, indices: Iterable[int]) -> Counts:
        """Return the size of these sequences together; reads tokens of a store with feedback only."""
        total = Counts()
        for index in indices:
            batch, row = self._find(int(index))
            if ROLES in batch.schema.names:
                total = sum(self[int(index)].examples(), total)
                continue
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
        front = self.front  # read once, because another thread may replace it
        if not 0 <= index < len(front):
            raise IndexError(f"sequence {index} of {len(front)}")
        number = int(np.searchsorted(front.ends, index, side="right")) - 1
        return number, int(index - front.ends[number]), front.shards[number].packs

    def _find(self, index: int) -> tuple[Any, int]:
        number, row, _ = self.locate(index)
        return self._map(number), row


def wrong_size(uri: str, wanted: Manifest) -> str | None:
    """Return which shard is missing or has another size than in the manifest; None if none."""
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
    start = lists.offsets[row].as_py()
    stop = lists.offsets[row + 1].as_py()
    return lists.values.slice(start, stop - start)
