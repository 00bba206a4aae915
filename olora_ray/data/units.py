"""Units: the smallest pieces of files that are read at once, in arrays of 40 bytes each; and the scan of a file."""

import base64
import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from olora_ray.common import storage
from olora_ray.common.storage import digest, read_sealed, seal
from olora_ray.data.sources import File, open_filesystem

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


# Scans that are kept: below the storage path there is one for each file, so an unchanged file is not read again.


VERSION = 5
"""Changes whenever a kept scan would be another."""
SETTLED = 10.0
"""Seconds since its last change before which the scan of a file is not kept: clocks of storages are coarse, and a
file that changes twice within a tick shows one time."""
BELIEVED_FROM = 64 * 2**20
"""Bytes from which a file is believed to be unchanged though its inode is another."""
AT_ONCE = 16
"""Kept scans that are read at the same time: in an object store each is a request."""


def find(file: File, storage_root: str) -> FileScan | None:
    """The kept scan of a file; None if there is none, or the file has changed since."""
    if not (storage_root and file.modified) or (tree := read_sealed(_place(file, storage_root))) is None:
        return None
    if [tree.get("size"), tree.get("modified")] != [file.size, file.modified]:
        return None
    if file.size < BELIEVED_FROM and tree.get("state") != state_of(file):
        return None
    return _from_json(tree)


def find_all(files: Sequence[File], storage_root: str) -> list[FileScan | None]:
    """`find` for each of the files."""
    if len(files) < 2 or not storage.is_uri(storage_root):
        return [find(file, storage_root) for file in files]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda file: find(file, storage_root), files))


def state_of(file: File) -> list[int] | None:
    """Inode and the time of its last change, of a local file."""
    system, path = open_filesystem(file.uri)
    with contextlib.suppress(OSError):
        if system.type_name == "local":
            found = os.stat(path)
            return [found.st_ino, found.st_ctime_ns]
    return None


def keep(file: File, storage_root: str, scan: FileScan, state: list[int] | None) -> None:
    """Keep a scan; `state` is that of the file before it was scanned."""
    if storage_root and file.modified and time.time() - file.modified / 1e9 >= SETTLED:
        known = {"size": file.size, "modified": file.modified, "state": state}
        storage.write_text(_place(file, storage_root), seal({**known, **_to_json(scan)}), durable=False)


def forget(file: File, storage_root: str) -> None:
    """Drop the kept scan of a file that has other content, though size and time of change are the same."""
    if storage_root:
        storage.remove(_place(file, storage_root))


def _place(file: File, storage_root: str) -> str:
    return storage.join(storage_root, "tokens", "scans", f"{digest(VERSION, file.uri, length=32)}.json")


def _to_json(scan: FileScan) -> dict[str, Any]:
    units = base64.b64encode(scan.units.table.tobytes()).decode()
    return {"sha256": scan.sha256, "rows": scan.rows, "columns": scan.columns, "units": units}


def _from_json(tree: dict[str, Any]) -> FileScan:
    units = np.frombuffer(base64.b64decode(tree["units"]), dtype=UNIT)
    return FileScan(tree["sha256"], tree["rows"], tuple(tree["columns"]), Units(units))
