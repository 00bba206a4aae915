"""Layout of a token store: which units make which shard, as arrays. A billion rows are four million units.

A unit takes 40 bytes and each use of it 8 more; `Piece` objects are made of one shard at a time.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from olora_ray.data.reader import UNIT, Table, Unit, Units, as_unit

# Pseudo-random numbers as functions of a key and a counter: the same with every machine, numpy and Ray.


Words = NDArray[np.uint64]
Indices = NDArray[np.int64]

ROUNDS = 8
"""Rounds of the Feistel network; four make a pseudo-random permutation, the rest costs nothing."""


def key(*parts: object) -> int:
    """A 64-bit key from anything that has a stable `str`."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "little")


def mix(seed: int, counters: Words) -> Words:
    """One uniform 64-bit word for each counter (splitmix64)."""
    word = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def permutation(size: int, seed: int) -> Indices:
    """A permutation of range(size) that depends on the seed alone."""
    return np.argsort(mix(seed, np.arange(size, dtype=np.uint64)), kind="stable").astype(np.int64)


def bernoulli_mask(share: float, seed: int, counters: Indices) -> NDArray[np.bool_]:
    """Mask of the counters that fall into a random `share` of all; depends on each counter and the seed alone."""
    return mix(seed, counters.astype(np.uint64)) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def permute_at(places: Indices, size: int, seed: int) -> Indices:
    """The elements of a permutation of range(size) at `places`, without making the whole permutation.

    A Feistel network permutes the next power of four; what falls outside the range walks on until
    it is inside, which keeps it a permutation of the range.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    result = _feistel(places.astype(np.uint64), half, seed)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], half, seed)
    return result.astype(np.int64)


def _feistel(words: Words, half: np.uint64, seed: int) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = words >> half, words & mask
    for turn in range(ROUNDS):
        left, right = right, left ^ (mix(key(seed, turn), right) & mask)
    return (left << half) | right


Take = tuple[int, float]
"""What is taken of a unit: number of the pass over its source, and the share of the rows."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the plan: a unit, and what of it is taken."""

    file: int
    """Index into `Plan.files`."""
    unit: Unit
    turn: int
    """Number of the pass over the source."""
    share: float
    """Of the rows; below 1 they are drawn by a hash of their place, see draws.py."""


class Pieces(Sequence[Piece]):
    """A sequence of pieces, kept as arrays."""

    def __init__(self, units: Table, unit: NDArray[np.uint32], take: NDArray[np.uint32], takes: Sequence[Take]) -> None:
        """Piece k is `units[unit[k]]`, of which `takes[take[k]]` is taken."""
        self.units, self.unit, self.take, self.takes = units, unit, take, tuple(takes)

    @property
    def files(self) -> NDArray[np.uint32]:
        """(pieces,) the file of each."""
        return self.units["file"][self.unit]

    @property
    def rows(self) -> Floats:
        """(pieces,) rows that are taken of each, about."""
        return self._taken("rows")

    @property
    def sizes(self) -> Floats:
        """(pieces,) bytes that are taken of each, about."""
        return self._taken("size")

    @property
    def bytes(self) -> int:
        """Bytes that are read, once for each piece."""
        return int(self.units["size"][self.unit].sum(dtype=np.int64))

    def compact(self) -> "Pieces":
        """The same with only the units that it uses."""
        used, unit = np.unique(self.unit, return_inverse=True)
        return Pieces(self.units[used], unit.astype(np.uint32), self.take, self.takes)

    def _taken(self, field: str) -> Floats:
        shares = np.array([share for _, share in self.takes])
        return self.units[field][self.unit] * shares[self.take]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.unit)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: "slice | NDArray[Any]") -> "Pieces": ...
    def __getitem__(self, index: "int | slice | NDArray[Any]") -> "Piece | Pieces":
        if isinstance(index, slice | np.ndarray):
            return Pieces(self.units, self.unit[index], self.take[index], self.takes)
        entry = self.units[self.unit[index]]
        return Piece(int(entry["file"]), as_unit(entry), *self.takes[self.take[index]])


class Shards(Sequence[Pieces]):
    """The pieces of each shard."""

    def __init__(self, pieces: Pieces, cuts: NDArray[np.int64]) -> None:
        """Shard k has the pieces `cuts[k]` to `cuts[k + 1]`."""
        self.pieces, self.cuts = pieces, cuts

    def __len__(self) -> int:
        return len(self.cuts) - 1

    @overload
    def __getitem__(self, index: int) -> Pieces: ...
    @overload
    def __getitem__(self, index: slice) -> "tuple[Pieces, ...]": ...
    def __getitem__(self, index: "int | slice") -> "Pieces | tuple[Pieces, ...]":
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        return self.pieces[self.cuts[number] : self.cuts[number + 1]]


def joined(parts: list[Units]) -> Table:
    """The units of several files in one array, each with the number of its file; the list is emptied on the way."""
    table = np.empty(sum(map(len, parts)), UNIT)
    start = 0
    for file in range(len(parts)):
        stop = start + len(parts[file])
        table[start:stop] = parts[file].table
        table["file"][start:stop] = file
        parts[file] = Units(table[:0])  # so that there are never two copies of all
        start = stop
    return table


def turns(weight: float) -> list[float]:
    """The share of the rows in each pass: 2.5 -> 1, 1, 0.5."""
    whole = int(weight)
    rest = weight - whole
    return [1.0] * whole + ([rest] if rest > 1e-9 or not whole else [])


def in_turn(units: Table, borders: Sequence[int], weights: Sequence[float]) -> Pieces:
    """The sources one after the other, in the order of their files.

    Source k has the units `borders[k]` to `borders[k + 1]`, and is used as often as `weights[k]` says.
    """
    return _together(units, [_source(units, low, high, w, None) for low, high, w in _each(borders, weights)])


def mixed(units: Table, borders: Sequence[int], weights: Sequence[float], seed: int) -> Pieces:
    """Each source shuffled, each of its turns in an order of its own; all interleaved, each spread over the whole."""
    sources = [
        _source(units, low, high, weight, (seed, number))
        for number, (low, high, weight) in enumerate(_each(borders, weights))
    ]
    middles = np.concatenate([_middles(pieces.rows) for pieces in sources])
    numbers = np.repeat(np.arange(len(sources), dtype=np.uint32), [len(pieces) for pieces in sources])
    return _together(units, sources)[np.lexsort((numbers, middles))]


def _each(borders: Sequence[int], weights: Sequence[float]) -> list[tuple[int, int, float]]:
    return [(low, high, weight) for (low, high), weight in zip(itertools.pairwise(borders), weights, strict=True)]


def _source(units: Table, low: int, high: int, weight: float, seed: tuple[int, int] | None) -> Pieces:
    """The units low..high-1 as often as the weight says; each turn in an order of its own, if there is a seed."""
    takes = list(enumerate(turns(weight)))
    orders = [_order(high - low, seed, turn) + np.uint32(low) for turn, _ in takes]
    return Pieces(units, np.concatenate(orders), np.repeat(np.arange(len(takes), dtype=np.uint32), high - low), takes)


def _order(count: int, seed: tuple[int, int] | None, turn: int) -> NDArray[np.uint32]:
    if seed is None:
        return np.arange(count, dtype=np.uint32)
    return permutation(count, key("units", *seed, turn)).astype(np.uint32)


def _middles(rows: Floats) -> Floats:
    """Where the middle of each piece lies in its source, from 0 to 1."""
    return (np.cumsum(rows) - rows / 2) / rows.sum()  # type: ignore[no-any-return]


def _together(units: Table, sources: Sequence[Pieces]) -> Pieces:
    firsts = np.cumsum([0, *[len(pieces.takes) for pieces in sources]]).astype(np.uint32)
    return Pieces(
        units,
        np.concatenate([pieces.unit for pieces in sources]),
        np.concatenate([pieces.take + first for pieces, first in zip(sources, firsts, strict=False)]),
        [take for pieces in sources for take in pieces.takes],
    )
