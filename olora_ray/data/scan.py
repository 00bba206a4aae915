"""Scan of a file in one pass: the digest of its content, and the units by which it can be read from anywhere.

Scanning costs about as much as reading. The result for a large file is kept under the storage path,
and holds as long as the file's size and time of change do.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from olora_ray.common import storage
from olora_ray.common.digests import digest
from olora_ray.common.errors import UserError
from olora_ray.common.sealed import read_sealed, seal
from olora_ray.data import reader
from olora_ray.data.reader import Unit
from olora_ray.data.sources import File, open_filesystem

CHUNK = 8 * 2**20
STEP = 16
"""Lines between the places at which a unit may start."""
UNIT_ROWS = 256
UNITS_WANTED = 64
"""A small file has smaller units, so that it can be mixed evenly with others."""
UNIT_BYTES = 4 * 2**20
SLOW_UNITS = 8
"""Units of a file that can only be read from its start."""
SLOW_UNIT_BYTES = 32 * 2**20
DOCUMENT_BYTES = 2**20
"""A text file above this size is cut at line ends into several documents."""
CACHED_FROM = 64 * 2**20
"""Bytes from which the scan of a file is kept."""


@dataclass(frozen=True)
class FileScan:
    """Digest, size and units of a file."""

    sha256: str
    rows: int
    """Rows, blank lines included."""
    columns: tuple[str, ...]
    """Names of the columns where the file has a header or schema."""
    units: tuple[Unit, ...]


def scan(file: File, storage_root: str) -> FileScan:
    """Scan a file, or take the kept result; raises UserError for a file that is broken as a whole."""
    if file.size < CACHED_FROM or not file.modified:
        return _scan(file)
    key = digest(2, file.uri, file.size, file.modified, length=32)
    kept = storage.join(storage_root, "tokens", "scans", f"{key}.json")
    if (tree := read_sealed(kept)) is not None:
        return _from_json(tree)
    result = _scan(file)
    storage.write_text(kept, seal(_to_json(result)))
    return result


def head(file: File) -> FileScan:
    """A cheap look at a file: without digest, with the units at its start, and an estimate of its rows."""
    if file.kind in ("jsonl", "csv", "text"):
        return _lines(file, limit=CHUNK)
    return _scan(file, digest=False)


def _to_json(scan: FileScan) -> dict[str, Any]:
    return {**asdict(scan), "units": [[unit.first, unit.rows, unit.offset, unit.size] for unit in scan.units]}


def _from_json(tree: dict[str, Any]) -> FileScan:
    units = tuple(Unit(*numbers) for numbers in tree["units"])
    return FileScan(tree["sha256"], tree["rows"], tuple(tree["columns"]), units)


def _scan(file: File, digest: bool = True) -> FileScan:
    try:
        match file.kind:
            case "jsonl" | "csv" | "text":
                return _lines(file)
            case "json":
                rows = len(reader.load_json(file))
                return FileScan(
                    _sha256(file) if digest else "", rows, (), tuple(_slices(0, rows, file.size, SLOW_UNITS))
                )
            case "parquet":
                return _parquet(file, digest)
            case _:
                return _arrow(file, digest)
    except FileNotFoundError:
        raise UserError(f"{file.uri}: no such file") from None
    except PermissionError:
        raise UserError(f"{file.uri}: no permission to read it") from None
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise reader.broken(file, error) from None


class _Hashed:
    """A stream that hashes what is read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._stream.read(size if size >= 0 else None)
        self.sha256.update(content)
        self.bytes += len(content)
        return content

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._stream.close()

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _sha256(file: File) -> str:
    system, path = open_filesystem(file.uri)
    with _Hashed(system.open_input_stream(path, compression=None)) as stream:
        while stream.read(CHUNK):
            pass
        return stream.sha256.hexdigest()


def _lines(file: File, limit: int | None = None) -> FileScan:
    """Scan a file of lines; only its first `limit` bytes if there is a limit."""
    hashed: list[_Hashed] = []

    def wrap(stream: Any) -> _Hashed:
        hashed.append(_Hashed(stream))
        return hashed[0]

    with reader.open_stream(file, wrap) as stream:
        ends, total, header = _line_ends(stream, file.kind, limit)
        seen = hashed[0].bytes
        while limit is None and hashed[0].read(CHUNK):  # whatever stands after the compressed content
            pass
    columns = tuple(reader.parse_csv_line(header.removeprefix(reader.BOM))) if file.kind == "csv" else ()
    units = _documents(ends, total) if file.kind == "text" else _line_units(ends, total, int(file.kind == "csv"), file)
    found = tuple(units)
    rows = sum(unit.rows for unit in found)
    if limit is not None:
        return FileScan("", round(rows * max(1.0, file.size / max(seen, 1))), columns, found)
    return FileScan(hashed[0].sha256.hexdigest(), rows, columns, found)


def _line_ends(stream: Any, kind: str, limit: int | None) -> tuple[NDArray[np.int64], int, bytes]:
    """The offset after the end of each line (negative where no csv record ends), the bytes, and the csv header.

    With a `limit` on the bytes, the line that is cut by it is left out.
    """
    parts: list[NDArray[np.int64]] = []
    total, quotes, header, header_done = 0, 0, b"", False
    last = b""
    while (limit is None or total < limit) and (chunk := stream.read(CHUNK)):
        letters = np.frombuffer(chunk, dtype=np.uint8)
        places = np.flatnonzero(letters == 10)
        ends = places.astype(np.int64) + total + 1
        if kind == "csv":
            marks = np.flatnonzero(letters == 34)
            inside = (quotes + np.searchsorted(marks, places)) % 2 == 1
            quotes += len(marks)
            if not header_done:
                outside = places[~inside]
                header += bytes(chunk[: outside[0] + 1] if len(outside) else chunk)
                header_done = bool(len(outside))
            ends[inside] *= -1  # a newline inside quotes: a line ends here, but no record
        parts.append(ends)
        total += len(chunk)
        last = bytes(chunk[-1:])
    if last not in (b"", b"\n") and (limit is None or total < limit):
        parts.append(np.array([total], dtype=np.int64))
    return (np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)), total, header


def _line_units(ends: NDArray[np.int64], total: int, skipped: int, file: File) -> Iterator[Unit]:
    """Units of lines, each about as many lines; a boundary is a line end at which a record ends."""
    lines = len(ends)
    records = np.flatnonzero(ends > 0)  # line numbers at which a record ends
    if len(records) <= skipped:
        return
    begin = int(records[skipped - 1]) + 1 if skipped else 0
    start = int(ends[begin - 1]) if begin else 0
    step, most = _unit_step(lines, total, file.compression is not None)
    cuts = records[records >= begin][step - 1 :: step]
    first = begin
    for cut in [*cuts.tolist(), int(records[-1])]:
        stop = int(ends[cut])
        while first <= cut:
            # Long lines: cut again wherever the bytes are too many.
            inner = int(np.searchsorted(np.abs(ends[first : cut + 1]), start + most, side="right")) + first - 1
            last = cut if stop - start <= most else _record_at(ends, max(inner, first), cut)
            end = int(ends[last])
            yield Unit(first, last + 1 - first, start, end - start)
            first, start = last + 1, end


def _record_at(ends: NDArray[np.int64], line: int, last: int) -> int:
    """The first line from `line` on at which a record ends."""
    while line < last and ends[line] < 0:
        line += 1
    return line


def _unit_step(lines: int, total: int, slow: bool) -> tuple[int, int]:
    """Lines of a unit, and the bytes from which on it is cut earlier."""
    if slow:
        count = max(min(SLOW_UNITS, lines // UNIT_ROWS), -(-total // SLOW_UNIT_BYTES), 1)
        return -(-lines // count), 2 * SLOW_UNIT_BYTES
    return int(np.clip(-(-lines // UNITS_WANTED) // STEP * STEP, STEP, UNIT_ROWS)), UNIT_BYTES


def _documents(ends: NDArray[np.int64], total: int) -> Iterator[Unit]:
    """A text file is one document, or several of about DOCUMENT_BYTES, cut at line ends."""
    start = number = 0
    while start < total:
        stop = total
        if total - start > DOCUMENT_BYTES:
            place = int(np.searchsorted(ends, start + DOCUMENT_BYTES))
            stop = int(ends[place]) if place < len(ends) else total
        yield Unit(number, 1, start, stop - start)
        start, number = stop, number + 1


def _slices(first: int, rows: int, size: int, wanted: int) -> Iterator[Unit]:
    """Equal parts of `rows` rows of `size` bytes: about `wanted`, more if they would be large."""
    count = max(min(wanted, rows // UNIT_ROWS), -(-size // SLOW_UNIT_BYTES), 1)
    borders = [rows * number // count for number in range(count + 1)]
    for low, high in itertools.pairwise(borders):
        if high > low:
            yield Unit(first + low, high - low, 0, size * (high - low) // rows)


def _parquet(file: File, digest: bool) -> FileScan:
    system, path = open_filesystem(file.uri)
    with system.open_input_file(path) as stream:
        opened = parquet.ParquetFile(stream)
        groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
        columns = tuple(opened.schema_arrow.names)
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    units: list[Unit] = []
    start = 0
    for rows, size in sizes:
        units.extend(_slices(start, rows, size, -(-SLOW_UNITS // len(sizes))))
        start += rows
    return FileScan(_sha256(file) if digest else "", start, columns, tuple(units))


def _arrow(file: File, digest: bool) -> FileScan:
    with reader.arrow_batches(file) as batches:
        columns = tuple(batches.schema.names)
        rows = sum(batch.num_rows for batch in batches)
    return FileScan(_sha256(file) if digest else "", rows, columns, tuple(_slices(0, rows, file.size, UNITS_WANTED)))
