"""Units: the smallest pieces of files that are read at once, in arrays of 40 bytes each; and the scan of a file."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

UNIT = np.dtype(
    [
        ("first", "<i8"),
        ("rows", "<u4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("before", "<u4"),
        ("after", "<u4"),
        ("file", "<u4"),
    ]
)
"""A unit in an array: the fields of `Unit`, and the number of its file where units of several stand in one array."""
Table = NDArray[np.void]
"""Array of UNIT."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a file: the smallest thing that is read at once."""

    first: int
    """Place of its first row."""
    rows: int
    """Rows, blank lines included."""
    offset: int
    """First byte, in files of lines; in Arrow files that of the batch with its first row; elsewhere 0."""
    size: int
    """Its bytes, uncompressed (an estimate where rows cannot be told apart without reading)."""
    before: int = 0
    """CRC-32 of everything before it, in files of lines; rows of that batch before it, in Arrow files; elsewhere 0."""
    after: int = 0
    """CRC-32 of everything up to its end, in files of lines; elsewhere of the whole file, uncompressed."""

    @property
    def end(self) -> int:
        """The byte after its last, in files of lines."""
        return self.offset + self.size


class Units(Sequence[Unit]):
    """The units of a file: a sequence of `Unit`, kept as an array."""

    def __init__(self, table: Table) -> None:
        self.table = table

    @classmethod
    def of(cls, units: Iterable[Unit]) -> "Units":
        """The same units as an array."""
        return cls(np.fromiter(((*astuple(unit), 0) for unit in units), dtype=UNIT))

    @property
    def rows(self) -> int:
        """Rows of all."""
        return int(self.table["rows"].sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> "Units": ...
    def __getitem__(self, index: int | slice) -> "Unit | Units":
        return Units(self.table[index]) if isinstance(index, slice) else as_unit(self.table[index])

    def __iter__(self) -> Iterator[Unit]:
        return map(as_unit, self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and np.array_equal(self.table, other.table)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class FileScan:
    """Digest, size and units of a file."""

    sha256: str
    rows: int
    """Rows, blank lines included."""
    columns: tuple[str, ...]
    """Names of the columns where the file has a header or schema."""
    units: Units


def as_unit(entry: Any) -> Unit:
    """The unit of an entry of an array."""
    return Unit(*entry.item()[:6])
