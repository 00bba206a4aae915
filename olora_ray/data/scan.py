"""Scan of a file in one pass: the digest of its content, and the units by which it can be read from anywhere.

Scanning costs about as much as reading, so the results are kept (kept_scans.py).
"""

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.data import reader
from olora_ray.data import units as kept_scans
from olora_ray.data.reader import BOM
from olora_ray.data.sources import File, asked, open_filesystem, steady
from olora_ray.data.units import FileScan, Unit, Units

# Files of lines (jsonl, text): where a unit may end, and the units; found in one pass. csv has csv_records.py.


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
LINE_BYTES = 128 * 2**20
"""Largest line or csv record: it is read as a whole, and a few MB of .gz unpack to gigabytes."""
LINES = 2**25
"""Most lines of a compressed file, of which every one is noted until their number is known."""
_BEGUN_ROW = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*("|\Z)')

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Marks:
    """The places at which a unit may end, each the end of a record; one entry a place."""

    records: Numbers
    """Records up to there."""
    lines: Numbers
    """Lines up to there."""
    offsets: Numbers
    """Bytes up to there."""
    crcs: Numbers
    """CRC-32 of these bytes."""
    skipped: int = 0
    """Records before the first row: the header of a csv file."""


def mark_lines(stream: Any, file: File, limit: int | None) -> Marks:
    """Mark the lines of a stream, or those of about its first `limit` bytes.

    Raises UserError for a line that is too long to be a row, for too many lines in a compressed file, and for a jsonl
    file that ends in the middle of a row.
    """
    parts: list[tuple[Numbers, Numbers, Numbers]] = []
    total = lines = crc = line_start = document = 0
    open_line = b""
    while (limit is None or total < limit or not parts) and (chunk := stream.read(CHUNK)):
        ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10).astype(np.int64) + total + 1
        sizes = np.diff(ends, prepend=line_start)
        numbers = lines + 1 + np.arange(len(ends))
        if file.kind == "text":
            kept = _document_ends(ends, document)
        elif file.compression:
            kept = np.arange(len(ends))
        else:
            kept = np.flatnonzero(_may_end_units(numbers, sizes))
        crcs, crc = _running_crcs(chunk, ends[kept] - total, crc)
        if len(kept):
            parts.append((numbers[kept], ends[kept], crcs))
            document = int(ends[kept[-1]])
        check_sizes(sizes, file, lines)
        if file.kind == "jsonl":
            open_line = chunk[int(ends[-1]) - total :] if len(ends) else open_line + chunk
        lines += len(ends)
        total += len(chunk)
        line_start = int(ends[-1]) if len(ends) else line_start
        check_sizes(np.array([total - line_start]), file, lines)
        check_count(lines, file)
    marked = int(parts[-1][1][-1]) if parts else 0
    if marked < total and (limit is None or total < limit or not parts):  # no newline at the end of the file
        if is_cut_row(open_line):
            raise cut_off(file, lines + 1)
        last = (lines + (total > line_start), total, crc)
        parts.append((np.array(last[:1]), np.array(last[1:2]), np.array(last[2:])))
    numbers, offsets, crcs = (
        np.concatenate([np.zeros(0, np.int64), *(part[column] for part in parts)]) for column in range(3)
    )
    return Marks(numbers, numbers, offsets, crcs)


def check_sizes(sizes: Numbers, file: File, lines: int) -> None:
    """Refuse a line that is too long; `sizes` are those of the lines after the first `lines`."""
    if len(sizes) and sizes.max() > LINE_BYTES:
        raise too_long(file, lines + 1 + int(sizes.argmax()))


def too_long(file: File, line: int) -> UserError:
    """The message for a line, or a csv record that begins in it, that is too long to be a row."""
    hint = "" if file.kind in ("jsonl", "text") else " (is a quoted cell not closed?)"
    return UserError(f"{file.uri}:{line}: a row of more than {LINE_BYTES >> 20} MiB, which is not read{hint}")


def is_cut_row(line: bytes) -> bool:
    """True if the last line of a jsonl file, which has no newline, begins an object that does not end."""
    try:
        if _BEGUN_ROW.match(line):
            json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return error.msg != "Extra data"
    except UnicodeDecodeError:
        return True
    except (RecursionError, ValueError):
        pass  # The reader rejects the row and says why.
    return False


def cut_off(file: File, line: int | None = None) -> UserError:
    """The message for a file whose last row is incomplete."""
    place = file.uri if line is None else f"{file.uri}:{line}"
    return UserError(
        f"{place}: the file ends in the middle of a row: it is incomplete, or still being copied; copy it again, or"
        " call again when it is whole"
    )


def check_count(lines: int, file: File) -> None:
    """Refuse a compressed file of too many lines."""
    if file.compression and lines > LINES:
        raise UserError(f"{file.uri}: more than {LINES:,} lines in a compressed file; give it as several smaller files")


def _may_end_units(numbers: Numbers, sizes: Numbers) -> NDArray[np.bool_]:
    """The lines of a chunk at which a unit may end: of a large file few, which saves nearly all of the memory.

    A unit of a large file ends after each UNIT_ROWS lines, and anywhere in such a block if the block is large.
    """
    block = (numbers - 1) // UNIT_ROWS
    block -= block[:1].sum()
    large = np.bincount(block, weights=sizes) > UNIT_BYTES
    large[:1] = large[-1:] = True  # they may go on in the next chunk
    kept: NDArray[np.bool_] = (numbers <= UNITS_WANTED * UNIT_ROWS) | (numbers % UNIT_ROWS == 0) | large[block]
    return kept


def _document_ends(ends: Numbers, start: int) -> Numbers:
    """Indices of the line ends of a chunk at which a document ends; the one under way begins at `start`."""
    found = []
    while (place := int(np.searchsorted(ends, start + DOCUMENT_BYTES))) < len(ends):
        found.append(place)
        start = int(ends[place])
    return np.array(found, dtype=np.int64)


def _running_crcs(chunk: bytes, ends: Numbers, crc: int) -> tuple[Numbers, int]:
    """The CRC-32 of everything up to each of the ends, and up to the end of the chunk."""
    view, found, start = memoryview(chunk), [], 0
    for end in ends.tolist():
        crc = zlib.crc32(view[start:end], crc)
        found.append(crc)
        start = end
    return np.array(found, dtype=np.int64), zlib.crc32(view[start:], crc)


def row_units(marks: Marks, file: File) -> Iterator[Unit]:
    """Units of about as many records each; long lines make them smaller."""
    if not len(marks.records) or marks.records[-1] <= marks.skipped:
        return
    step, most = _unit_step(int(marks.lines[-1]), int(marks.offsets[-1]), file.compression is not None)
    first = int(np.searchsorted(marks.records, marks.skipped, side="right"))
    cuts = np.flatnonzero((marks.records > marks.skipped) & ((marks.records - marks.skipped) % step == 0))
    for cut in [*cuts.tolist(), len(marks.records) - 1]:
        while first <= cut:
            start = int(marks.offsets[first - 1]) if first else 0
            fitting = int(np.searchsorted(marks.offsets[first : cut + 1], start + most, side="right")) + first - 1
            last = max(fitting, first)
            yield _unit(marks, first, last)
            first = last + 1


def documents(marks: Marks) -> Iterator[Unit]:
    """A text file is one document, or several of about DOCUMENT_BYTES, cut at line ends."""
    for number in range(len(marks.offsets)):
        cut = _unit(marks, number, number)
        yield Unit(number, 1, cut.offset, cut.size, cut.before, cut.after)


def _unit(marks: Marks, first: int, last: int) -> Unit:
    """The unit of the lines after mark `first` - 1 up to mark `last`."""
    line, start, crc = (int(numbers[first - 1]) if first else 0 for numbers in (marks.lines, marks.offsets, marks.crcs))
    rows, size = int(marks.lines[last]) - line, int(marks.offsets[last]) - start
    return Unit(line, rows, start, size, crc, int(marks.crcs[last]))


def _unit_step(lines: int, total: int, slow: bool) -> tuple[int, int]:
    """Records of a unit, and the bytes from which on it is cut earlier."""
    if slow:
        count = max(min(SLOW_UNITS, lines // UNIT_ROWS), -(-total // SLOW_UNIT_BYTES), 1)
        return -(-lines // count), 2 * SLOW_UNIT_BYTES
    return int(np.clip(-(-lines // UNITS_WANTED) // STEP * STEP, STEP, UNIT_ROWS)), UNIT_BYTES


# Records of a csv or tsv file: where they end, as csv.reader itself tells them apart.


def mark_records(stream: Any, file: File, limit: int | None) -> tuple[Marks, tuple[str, ...]]:
    """Mark the records of a stream, or those of about its first `limit` bytes, and read the header.

    The header is the first record that is not blank. Raises UserError for a record that is too long to be a row,
    for a quoted cell that is never closed, and for a file that ends in the middle of a row.
    """
    marks = _Marks(file)
    source = _Lines(stream, file, limit)
    header: list[str] | None = None
    csv.field_size_limit(reader.CELL_LIMIT)
    try:
        for cells in csv.reader(source, delimiter=reader.DELIMITERS[file.kind]):
            if source.ended:  # the lines have, but not the record
                if limit is None:
                    raise _not_closed(file, source.record_line)
                break
            if source.unfinished and header and 0 < len(cells) < len(header):
                raise cut_off(file, source.record_line)
            if header is None:
                header = cells or None
                marks.skipped = marks.records + 1
            else:
                source.has_row = True
            marks.add(source)
            source.begin_record()
    except csv.Error as error:
        raise UserError(f"{file.uri}:{source.record_line}: not a readable csv record: {error}") from None
    return marks.arrays(), tuple(_utf8(cell) for cell in header or ())


class _Lines:
    """The lines of a stream one by one, counted as they are taken."""

    def __init__(self, stream: Any, file: File, limit: int | None) -> None:
        self.lines = self.total = self.crc = 0
        self.record_line, self._record_start = 1, 0
        self.ended = False
        self.unfinished = False
        """True from the last line on if it has no line end."""
        self.has_row = False
        """Whether there is a row yet: without one a limit does not end the lines."""
        self._stream, self._file, self._limit = stream, file, limit

    def begin_record(self) -> None:
        """The next line begins a record."""
        self.record_line, self._record_start = self.lines + 1, self.total

    def __iter__(self) -> Iterator[str]:
        for line in self._split():
            self.lines += 1
            self.total += len(line)
            self.crc = zlib.crc32(line, self.crc)
            if self.total - self._record_start > LINE_BYTES:
                raise too_long(self._file, self.record_line)
            # Latin-1 is fast and has a letter for each byte; quotes, delimiters and line ends are those of UTF-8.
            yield (line.removeprefix(BOM) if self.lines == 1 else line).decode("latin-1")
        self.ended = True

    def _split(self) -> Iterator[bytes]:
        rest, seen = b"", 0
        while chunk := self._stream.read(CHUNK):
            seen += len(chunk)
            found = (rest + chunk).splitlines(keepends=True)
            # The last line may go on in the next chunk, and so may "\r" with its "\n".
            rest = b"" if found[-1].endswith(b"\n") else found.pop()
            yield from found
            if len(rest) > LINE_BYTES:
                raise too_long(self._file, self.record_line)
            check_count(self.lines, self._file)
            if self._limit is not None and seen >= self._limit and self.has_row:
                return
        if rest:
            self.unfinished = not rest.endswith(b"\r")
            yield rest


class _Marks:
    """The ends of records, collected; of a large file few are kept, which saves nearly all of the memory."""

    def __init__(self, file: File) -> None:
        self.records = self.skipped = 0
        self._all = file.compression is not None
        self._columns = tuple(array("q") for _ in range(4))
        self._block, self._block_start = 0, 0

    def add(self, source: _Lines) -> None:
        """The record ends where the source is. See lines._may_end_units for what is kept."""
        self.records += 1
        records, numbers, offsets, crcs = self._columns
        records.append(self.records)
        numbers.append(source.lines)
        offsets.append(source.total)
        crcs.append(source.crc)
        if (self.records - self.skipped) % UNIT_ROWS == 0:
            many = self.records - self.skipped > UNITS_WANTED * UNIT_ROWS
            if many and not self._all and source.total - self._block_start <= UNIT_BYTES:
                for column in self._columns:
                    del column[self._block : -1]
            self._block, self._block_start = len(self._columns[0]), source.total

    def arrays(self) -> Marks:
        """What was collected."""
        records, numbers, offsets, crcs = (np.array(column, dtype=np.int64) for column in self._columns)
        return Marks(records, numbers, offsets, crcs, self.skipped)


def _utf8(cell: str) -> str:
    return cell.encode("latin-1").decode("utf-8", "replace")


def _not_closed(file: File, line: int) -> UserError:
    return UserError(
        f"{file.uri}:{line}: a quoted cell of the record that begins here is not closed before the end of the file:"
        " a cell that begins with a quote ends with one, and each quote inside it is doubled"
    )


TAIL = 2**20
"""Bytes at the end of a file that is not read as a whole, in which its last line is looked for."""


def scan(file: File, storage_root: str, keep: bool = True) -> FileScan:
    """Scan a file, or take the kept result; raises UserError for one that is broken, and StoreUnavailable."""
    if (kept := kept_scans.find(file, storage_root)) is not None:
        return kept
    state = kept_scans.state_of(file)
    result = _scan(file)
    if keep:
        kept_scans.keep(file, storage_root, result, state)
    return result


def head(file: File) -> FileScan:
    """A cheap look at a file: without digest, with the units at its start, and an estimate of its rows."""
    return dataclasses.replace(_scan(file, limit=CHUNK), sha256="")


def _scan(file: File, limit: int | None = None) -> FileScan:
    """Scan a file; with a limit only about that many bytes of a file of lines, and no digest of others."""
    try:
        found = asked(file.uri, lambda: _scanned(file, limit))
    except FileNotFoundError:
        raise reader.not_here(file) from None
    except PermissionError:
        raise UserError(f"{file.uri}: no permission to read it") from None
    except (*reader.UNREADABLE, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise reader.broken(file, error) from None
    named = [name for name in found.columns if name]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise UserError(f"{file.uri}: the column {twice!r} is there more than once; give each a name of its own")
    return found


def _scanned(file: File, limit: int | None) -> FileScan:
    match file.kind:
        case "jsonl" | "csv" | "tsv" | "text":
            return _lines(file, limit)
        case "json":
            return _json(file)
        case _:
            with steady(file):
                return _parquet(file, whole=limit is None) if file.kind == "parquet" else _arrow(file, limit)


class _Hashed:
    """A stream that hashes what is read from it."""

    def __init__(self, stream: Any, with_crc: bool = False) -> None:
        self._stream = stream
        self._with_crc = with_crc
        self.sha256 = hashlib.sha256()
        self.crc = 0
        self.bytes = 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._stream.read(size if size >= 0 else None)
        self.sha256.update(content)
        if self._with_crc:
            self.crc = zlib.crc32(content, self.crc)
        self.bytes += len(content)
        return content

    def finish(self) -> None:
        """Read on to the end: whatever stands after the content that was wanted."""
        while self.read(CHUNK):
            pass

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._stream.close()

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def _hashed(file: File) -> Iterator[tuple[Any, _Hashed]]:
    """The uncompressed content of a file as a stream, and what counts and hashes the bytes on disk beneath it."""
    found: list[_Hashed] = []

    def wrap(stream: Any) -> _Hashed:
        found.append(_Hashed(stream))
        return found[0]

    with reader.open_stream(file, wrap) as stream:
        yield stream, found[0]


def _lines(file: File, limit: int | None = None) -> FileScan:
    """Scan a file of lines; only about its first `limit` bytes if there is a limit."""
    columns: tuple[str, ...] = ()
    with _hashed(file) as (stream, hashed):
        if file.kind in reader.DELIMITERS:
            marks, columns = mark_records(stream, file, limit)
        else:
            marks = mark_lines(stream, file, limit)
        seen = hashed.bytes
        if limit is None:
            hashed.finish()
    units = Units.of(documents(marks) if file.kind == "text" else row_units(marks, file))
    rows = units.rows
    if limit is not None:
        rows = round(rows * max(1.0, file.size / max(seen, 1)))
        if file.kind == "jsonl" and file.compression is None and is_cut_row(_open_line(file)):
            raise cut_off(file)
    return FileScan(hashed.sha256.hexdigest(), rows, columns, units)


def _open_line(file: File) -> bytes:
    """The last line of a file if it has no newline; empty too if it is a long one."""
    system, path = open_filesystem(file.uri)
    with system.open_input_file(path) as stream:
        stream.seek(max(0, stream.size() - TAIL))
        _, newline, line = bytes(stream.read()).rpartition(b"\n")
    return line if newline else b""


def _json(file: File) -> FileScan:
    with _hashed(file) as (stream, hashed):
        content = reader.read_whole(stream, file)
        hashed.finish()
    rows, crc = len(reader.rows_of(file, content)), zlib.crc32(content)
    units = (dataclasses.replace(unit, after=crc) for unit in _slices(0, rows, file.size, SLOW_UNITS))
    return FileScan(hashed.sha256.hexdigest(), rows, (), Units.of(units))


def _slices(first: int, rows: int, size: int, wanted: int) -> Iterator[Unit]:
    """Equal parts of `rows` rows of `size` bytes: about `wanted`, more if they would be large."""
    count = max(min(wanted, rows // UNIT_ROWS), -(-size // SLOW_UNIT_BYTES), 1)
    borders = [rows * number // count for number in range(count + 1)]
    for low, high in itertools.pairwise(borders):
        if high > low:
            yield Unit(first + low, high - low, 0, size * (high - low) // rows)


def _parquet(file: File, whole: bool) -> FileScan:
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
    if not whole:
        return FileScan("", start, columns, Units.of(units))
    with _buffered(file) as hashed:
        hashed.finish()
    return _of_whole(hashed, start, columns, units)


def _arrow(file: File, limit: int | None) -> FileScan:
    """Scan a file that `datasets` has saved, in one pass; only about its first `limit` bytes if there is a limit."""
    with _buffered(file) as hashed:
        found = reader.look(hashed, lambda: hashed.bytes, limit)
        seen = hashed.bytes
        if limit is None:
            hashed.finish()
    rows = sum(found.rows)
    if limit is None:
        return _of_whole(hashed, rows, found.columns, found.placed(_slices(0, rows, file.size, UNITS_WANTED)))
    units = found.placed(_slices(0, rows, seen, UNITS_WANTED))
    return FileScan("", round(rows * max(1.0, file.size / max(seen, 1))), found.columns, Units.of(units))


def _buffered(file: File) -> _Hashed:
    """A stream of a file that is not compressed, of which little may be asked at a time."""
    system, path = open_filesystem(file.uri)
    return _Hashed(reader.buffered(system.open_input_stream(path, compression=None)), with_crc=True)


def _of_whole(hashed: _Hashed, rows: int, columns: tuple[str, ...], units: Iterable[Unit]) -> FileScan:
    """The scan of a file whose units are checked by the CRC-32 of all that it has."""
    units = (dataclasses.replace(unit, after=hashed.crc) for unit in units)
    return FileScan(hashed.sha256.hexdigest(), rows, columns, Units.of(units))
