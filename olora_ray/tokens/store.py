"""The token store: packed sequences on disk, addressed by what they were made of, read by number.

    <storage>/tokens/<digest>/
        shard-00000.arrow    packs, one row each (see shard.SCHEMA); memory-mapped
        shard-00000.json     written after it: the shard is done
        manifest.json        written last: the store is complete
        rejected.jsonl       the rows that could not be used, with the reason

A store is read while it grows: shards are made in order, and those at its front are there long before
the last. Reading needs neither Ray nor the tokenizer.
"""

import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olora_ray.common import sealed, storage
from olora_ray.common.errors import UserError
from olora_ray.tokens.front import Front
from olora_ray.tokens.manifest import (
    Manifest,
    Outline,
    ShardInfo,
    file_size,
    place_name,
    read_manifest,
    shard_name,
    sidecar_name,
)
from olora_ray.tokens.order import FEW_SHARDS, WINDOW, WindowedPass, order
from olora_ray.tokens.shard_files import ShardFiles

OPEN_SHARDS = max(FEW_SHARDS, 2 * WINDOW)
"""Shards that a process keeps mapped."""
LOOKS_AT_ONCE = 32
"""Shards of a growing store that are looked for at the same time."""


@dataclass(frozen=True)
class Pack:
    """One sequence: several examples side by side that do not see each other."""

    input_ids: NDArray[np.int32]
    """(tokens,)"""
    supervised: NDArray[np.bool_]
    """(tokens,) which tokens count in the loss; never the first of a segment."""
    segments: tuple[int, ...]
    """Tokens of each example; they sum up to the length of the sequence."""


class TokenStore:
    """A store, read by the number of the sequence; made by `open` or `growing`.

    Of a growing store the sequences of the shards at its front are known, and `refresh` looks for more.
    Pickles as its address and what is known. Threads may share it.
    """

    def __init__(
        self, uri: str, outline: Outline, shards: tuple[ShardInfo, ...] = (), manifest: Manifest | None = None
    ) -> None:
        """Use `open` or `growing`; `shards` are those at the front that are known."""
        self.uri, self.digest, self.shard_count = uri, outline.digest, outline.shards
        self.max_length, self.files = outline.max_length, outline.files
        self._outline, self._manifest = outline, manifest
        self._known = Front.of(manifest.shards if manifest else shards, outline.shards)
        self._lock = threading.Lock()
        self._files = ShardFiles(uri, outline.digest)
        self._map = lru_cache(OPEN_SHARDS)(self._opened)
        self._pass = lru_cache(2)(self._windowed)  # a step may lie in two

    @classmethod
    def open(cls, uri: str) -> "TokenStore":
        """Open a complete store; raises UserError if it is not complete or a shard is not what it was."""
        try:
            found = read_manifest(uri)
        except FileNotFoundError:
            raise UserError(f"token store {uri}: not there, or not complete (no manifest.json)") from None
        except ValueError as error:
            raise UserError(f"token store {uri}: manifest.json is damaged ({error}); start the run again") from None
        if problem := _wrong_size(uri, found):
            raise UserError(f"token store {uri}: {problem}; start the run again to have it made again")
        return cls(uri, found.outline(), (), found)

    @classmethod
    def growing(cls, uri: str, outline: Outline) -> "TokenStore":
        """A store of which any part may be there, or nothing."""
        store = cls(uri, outline)
        store.refresh()
        return store

    def __reduce__(self) -> tuple[Callable[..., "TokenStore"], tuple[Any, ...]]:
        """The address and what is known; shards are mapped again where it arrives."""
        shards = () if self._manifest else self._known.all()
        return TokenStore, (self.uri, self._outline, shards, self._manifest)

    @property
    def complete(self) -> bool:
        """Whether the manifest was there at the last look."""
        return self._manifest is not None

    @property
    def available_shards(self) -> int:
        """Number of shards at the front that were there at the last look."""
        return len(self._known)

    @property
    def available(self) -> int:
        """Number of sequences in those shards."""
        return int(self._known.ends[-1])

    @property
    def total(self) -> int | None:
        """Number of sequences of the store; None while shards are missing."""
        known = self._known
        return int(known.ends[-1]) if len(known) == self.shard_count else None

    @property
    def manifest(self) -> Manifest:
        """The manifest; looks for it, and raises UserError if the store is not complete."""
        self.refresh()
        if self._manifest is None:
            raise UserError(f"token store {self.uri}: not complete; start the run again to have it completed")
        return self._manifest

    def refresh(self) -> None:
        """Look for the manifest and for more shards; two requests to the storage when there is nothing new.

        A shard that is new costs two or three requests, of which many are under way at the same time.
        """
        with self._lock:
            if self._manifest is None and (found := self._found_manifest()):
                self._known, self._manifest = Front.of(found.shards, self.shard_count), found
            found_all, width = self._manifest is not None, 1
            while not found_all:
                infos = self._next_shards(width)
                self._known = self._known.more(infos)
                found_all, width = len(infos) < width, min(2 * width, LOOKS_AT_ONCE)

    def order(self, seed: int, start: int, stop: int) -> NDArray[np.int64]:
        """The sequences at places start..stop-1 of the endless training order, (stop - start,); see order.py.

        Any range costs about its own length. While shards are missing only the first pass is known.
        """
        if self.total is None:
            return np.arange(start, stop, dtype=np.int64)
        if not self.windowed:
            return order(self.total, seed, start, stop)
        epoch, place = np.divmod(np.arange(start, stop, dtype=np.int64), self.total)
        for number in np.unique(epoch[epoch > 0]).tolist():
            inside = epoch == number
            place[inside] = self._pass(seed, number).at(place[inside])
        return place

    @property
    def windowed(self) -> bool:
        """Whether later passes go through the store window by window."""
        return self.shard_count > FEW_SHARDS

    def _opened(self, number: int) -> Any:
        return self._files.open(number, self._known.shards[number])

    def _windowed(self, seed: int, number: int) -> WindowedPass:
        return WindowedPass(self._known.ends, seed, number)

    def __len__(self) -> int:
        """Number of sequences, once all shards are there."""
        assert self.total is not None, "a growing store has no length yet"
        return self.total

    def __getitem__(self, index: int) -> Pack:
        """Sequence `index`, 0 <= index < available; a copy, so that it may be changed."""
        batch, row = self._find(index)
        return Pack(
            input_ids=_slice(batch, "input_ids", row).to_numpy().copy(),
            supervised=_slice(batch, "supervised", row).to_numpy(zero_copy_only=False),
            segments=tuple(_slice(batch, "segments", row).to_pylist()),
        )

    def supervised(self, indices: Iterable[int]) -> int:
        """Number of tokens of these sequences that count in the loss."""
        total = 0
        for index in indices:
            batch, row = self._find(int(index))
            total += batch.column("supervised_count")[row].as_py()
        return total

    def origins(self, index: int) -> list[str]:
        """Origins of a sequence's examples, as file:line (a row number where there are no lines)."""
        batch, row = self._find(index)
        return [place_name(self.files, origin) for origin in _slice(batch, "origin", row).to_pylist()]

    def locate(self, index: int) -> tuple[int, int, int]:
        """Place of sequence `index`: number of its shard, place in it, sequences of the shard."""
        known = self._known  # once: `refresh` in another thread may replace it between two looks
        if not 0 <= index < known.ends[-1]:
            raise IndexError(f"sequence {index} of {known.ends[-1]}")
        number = int(np.searchsorted(known.ends, index, side="right")) - 1
        return number, int(index - known.ends[number]), known.shards[number].packs

    def _find(self, index: int) -> tuple[Any, int]:
        number, row, _ = self.locate(index)
        return self._map(number), row

    def _found_manifest(self) -> Manifest | None:
        """The manifest, if all is as it says; a store that is being repaired counts as growing."""
        try:
            found = read_manifest(self.uri)
        except (FileNotFoundError, ValueError):
            return None
        fits = found.digest == self.digest and len(found.shards) == self.shard_count
        return found if fits and not _wrong_size(self.uri, found) else None

    def _next_shards(self, width: int) -> list[ShardInfo]:
        """The next shards that are there, at most `width`."""
        front = self.available_shards
        numbers = range(front, min(front + width, self.shard_count))
        if len(numbers) < 2:
            found = [self._shard_info(number) for number in numbers]
        else:
            with ThreadPoolExecutor(len(numbers)) as pool:
                found = list(pool.map(self._shard_info, numbers))
        return [info for info in itertools.takewhile(lambda info: info is not None, found) if info]

    def _shard_info(self, number: int) -> ShardInfo | None:
        sidecar = sealed.read_sealed(storage.join(self.uri, sidecar_name(number)))
        if sidecar is None or file_size(self.uri, shard_name(number)) != sidecar["bytes"]:
            return None
        return ShardInfo.of(sidecar)


def _wrong_size(uri: str, wanted: Manifest) -> str | None:
    """The first shard whose size is not the manifest's, in words; None if there is none."""
    found = storage.files_below(uri)
    for number, shard in enumerate(wanted.shards):
        size = found.get(shard_name(number))
        if size is None:
            return f"{shard_name(number)} is missing (does every node see this folder?)"
        if size != shard.bytes:
            return f"{shard_name(number)} has {size} bytes instead of {shard.bytes}"
    return None


def _slice(batch: Any, column: str, row: int) -> Any:
    lists = batch.column(column)
    start, stop = lists.offsets[row].as_py(), lists.offsets[row + 1].as_py()
    return lists.values.slice(start, stop - start)
