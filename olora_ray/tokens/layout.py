"""Layout of a token store: which units make which shard, as arrays. A billion rows are four million units.

A unit takes 40 bytes and each use of it 8 more; `Piece` objects are made of one shard at a time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from olora_ray.data.units import UNIT, Table, Unit, Units, as_unit
from olora_ray.tokens import rng

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
    return rng.permutation(count, rng.key("units", *seed, turn)).astype(np.uint32)


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
