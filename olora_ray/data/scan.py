"""Scan of a file in one pass: the digest of its content, and the units by which it can be read from anywhere.

Scanning costs about as much as reading, so the results are kept.
"""

import base64
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest, read_sealed, seal
from olora_ray.data import reader
from olora_ray.data.reader import UNIT, FileScan, Unit, Units
from olora_ray.data.sources import File, asked, open_filesystem, steady
from olora_ray.data.text_files import BOM, DELIMITERS, as_written

# Files of lines: where a unit may end, and the units; found in one pass. The rules of units are part of the bytes of
# token stores: each of the next numbers decides which rows are shuffled together.


CHUNK = 8 * 2**20
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


def _mark_lines(stream: Any, file: File, limit: int | None) -> Marks:
    """Mark the lines of a stream, or those of about its first `limit` bytes.

    Raises UserError for a line that is too long to be a row, and for a jsonl file that ends in the middle of a row.
    """
    parts: list[Numbers] = []
    total = lines = crc = line_start = document = 0
    open_line = b""
    while (limit is None or total < limit or not parts) and (chunk := stream.read(CHUNK)):
        ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10).astype(np.int64) + total + 1
        sizes = np.diff(ends, prepend=line_start)
        numbers = lines + 1 + np.arange(len(ends))
        units = np.flatnonzero(_may_end_units(numbers, sizes))
        kept = _document_ends(ends, document) if file.kind == "text" else units
        crcs, crc = _running_crcs(chunk, ends[kept] - total, crc)
        if len(kept):
            parts.append(np.stack([numbers[kept], numbers[kept], ends[kept], crcs]))
            document = int(ends[kept[-1]])
        longest = int(sizes.argmax()) if len(sizes) else 0
        if len(sizes) and sizes[longest] > LINE_BYTES:
            raise _too_long(file, lines + 1 + longest)
        if file.kind == "jsonl":
            open_line = chunk[int(ends[-1]) - total :] if len(ends) else open_line + chunk
        lines += len(ends)
        total += len(chunk)
        line_start = int(ends[-1]) if len(ends) else line_start
        if total - line_start > LINE_BYTES:
            raise _too_long(file, lines + 1)
    marked = int(parts[-1][2, -1]) if parts else 0
    if marked < total and (limit is None or total < limit or not parts):  # no newline at the end of the file
        if _is_cut_row(open_line):
            raise _cut_off(file, lines + 1)
        last = lines + (total > line_start)
        parts.append(np.array([[last], [last], [total], [crc]]))
    return _marks(parts)


def _marks(parts: list[Numbers], skipped: int = 0) -> Marks:
    records, lines, offsets, crcs = np.concatenate([np.zeros((4, 0), np.int64), *parts], axis=1)
    return Marks(records, lines, offsets, crcs, skipped)


def _too_long(file: File, line: int) -> UserError:
    """The message for a line, or a csv record that begins in it, that is too long to be a row."""
    hint = "" if file.kind in ("jsonl", "text") else " (is a quoted cell not closed?)"
    return UserError(f"{file.uri}:{line}: a row of more than {LINE_BYTES >> 20} MiB, which is not read{hint}")


def _is_cut_row(line: bytes) -> bool:
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


def _cut_off(file: File, line: int) -> UserError:
    return UserError(
        f"{file.uri}:{line}: the file ends in the middle of a row: it is incomplete, or still being copied; copy it"
        " again, or call again when it is whole"
    )


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


def _row_units(marks: Marks, file: File) -> Iterator[Unit]:
    """Units of about as many records each; long lines make them smaller."""
    if not len(marks.records) or marks.records[-1] <= marks.skipped:
        return
    step, most = _unit_step(int(marks.lines[-1]), int(marks.offsets[-1]), bool(file.compression or file.encoding))
    first = int(np.searchsorted(marks.records, marks.skipped, side="right"))
    cuts = np.flatnonzero((marks.records > marks.skipped) & ((marks.records - marks.skipped) % step == 0))
    for cut in [*cuts.tolist(), len(marks.records) - 1]:
        while first <= cut:
            start = int(marks.offsets[first - 1]) if first else 0
            fitting = int(np.searchsorted(marks.offsets[first : cut + 1], start + most, side="right")) + first - 1
            last = max(fitting, first)
            yield _unit(marks, first, last)
            first = last + 1


def _documents(marks: Marks) -> Iterator[Unit]:
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
        step = -(-lines // count)
        # Of a large file a unit may end at few lines (`_may_end_units`).
        return step if lines <= UNITS_WANTED * UNIT_ROWS else -(-step // UNIT_ROWS) * UNIT_ROWS, 2 * SLOW_UNIT_BYTES
    return int(np.clip(-(-lines // UNITS_WANTED) // 16 * 16, 16, UNIT_ROWS)), UNIT_BYTES


# Records of a csv or tsv file: where they end, as csv.reader itself tells them apart.


def _mark_records(stream: Any, file: File, limit: int | None) -> tuple[Marks, tuple[str, ...]]:
    """Mark the records of a stream, or those of about its first `limit` bytes, and read the header.

    The header is the first record that is not blank. Raises UserError for a record that is too long to be a row,
    for a quoted cell that is never closed, and for a file that ends in the middle of a row.
    """
    source = _Lines(stream, file, limit)
    header: list[str] | None = None
    parts: list[Numbers] = []
    some: list[tuple[int, int, int, int]] = []
    records = skipped = 0

    def keep_some() -> None:
        """Keep the marks at which units may end, which saves nearly all of the memory for a large file."""
        part = np.array(some, dtype=np.int64).reshape(-1, 4).T
        if header is not None:
            before = parts[-1][2, -1] if parts and parts[-1].size else 0
            part = part[:, _may_end_units(part[0] - skipped, np.diff(part[2], prepend=before))]
        parts.append(part)
        some.clear()

    csv.field_size_limit(2**31 - 1)  # none: LINE_BYTES is the limit of a record
    try:
        for cells in csv.reader(source, delimiter=DELIMITERS[file.kind]):
            if source.ended:  # the lines have, but not the record
                if limit is None:
                    raise _not_closed(file, source.record_line)
                break
            if source.unfinished and header and 0 < len(cells) < len(header):
                raise _cut_off(file, source.record_line)
            if header is None:
                header = cells or None
                skipped = records + 1
            else:
                source.has_row = True
            records += 1
            some.append((records, source.lines, source.total, source.crc))
            if len(some) == 2**14:
                keep_some()
            source.begin_record()
    except csv.Error as error:
        raise UserError(f"{file.uri}:{source.record_line}: not a readable csv record: {error}") from None
    keep_some()
    names = (cell.encode("latin-1").decode("utf-8", "replace") for cell in header or ())
    return _marks(parts, skipped), tuple(names)


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
                raise _too_long(self._file, self.record_line)
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
                raise _too_long(self._file, self.record_line)
            if self._limit is not None and seen >= self._limit and self.has_row:
                return
        if rest:
            self.unfinished = not rest.endswith(b"\r")
            yield rest


def _not_closed(file: File, line: int) -> UserError:
    return UserError(
        f"{file.uri}:{line}: a quoted cell of the record that begins here is not closed before the end of the file:"
        " a cell that begins with a quote ends with one, and each quote inside it is doubled"
    )


def scan(file: File, storage_root: str, keep: bool = True) -> FileScan:
    """Scan a file, or take the kept result; raises UserError for one that is broken, and StoreUnavailable."""
    if (kept := kept_scan(file, storage_root)) is not None:
        return kept
    state = state_of(file)
    result = _scan(file)
    if keep:
        keep_scan(file, storage_root, result, state)
    return result


def head(file: File) -> FileScan:
    """A cheap look at a file: without digest, with the units at its start, and an estimate of its rows."""
    return dataclasses.replace(_scan(file, limit=CHUNK), sha256="")


def _scan(file: File, limit: int | None = None) -> FileScan:
    """Scan a file; with a limit only about that many bytes of a file of lines, and no digest of others."""
    try:
        written = asked(file.uri, lambda: _written(file))
        found = asked(file.uri, lambda: _scanned(written, limit))
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
    return dataclasses.replace(found, file=written)


def _written(file: File) -> File:
    if file.kind in ("text", "parquet", "arrow"):
        return file
    with reader.open_stream(file) as stream:
        kind, encoding = as_written(file.kind, bytes(stream.read(2**20)))
    return dataclasses.replace(file, kind=kind, encoding=encoding)


def _scanned(file: File, limit: int | None) -> FileScan:
    match file.kind:
        case "json":
            return _json(file)
        case "parquet" | "arrow":
            with steady(file):
                return _parquet(file, whole=limit is None) if file.kind == "parquet" else _arrow(file, limit)
        case _:
            return _lines(file, limit)


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
        if file.kind in DELIMITERS:
            marks, columns = _mark_records(stream, file, limit)
        else:
            marks = _mark_lines(stream, file, limit)
        seen = hashed.bytes
        if limit is None:
            hashed.finish()
    units = Units.of(_documents(marks) if file.kind == "text" else _row_units(marks, file))
    rows = units.rows
    if limit is not None:
        rows = round(rows * max(1.0, file.size / max(seen, 1)))
    return FileScan(hashed.sha256.hexdigest(), rows, columns, units)


def _json(file: File) -> FileScan:
    with _hashed(file) as (stream, hashed):
        content = reader.read_whole(stream, file)
        hashed.finish()
    rows = len(reader.rows_of(file, content))
    return _of_whole(hashed, zlib.crc32(content), rows, (), _slices(0, rows, file.size, SLOW_UNITS))


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
    return _of_whole(hashed, hashed.crc, start, columns, units)


def _arrow(file: File, limit: int | None) -> FileScan:
    """Scan a file that `datasets` has saved, in one pass; only about its first `limit` bytes if there is a limit."""
    with _buffered(file) as hashed:
        found = reader.look(hashed, lambda: hashed.bytes, limit)
        seen = hashed.bytes
        if limit is None:
            hashed.finish()
    rows = sum(found.rows)
    units = found.placed(_slices(0, rows, file.size if limit is None else seen, UNITS_WANTED))
    if limit is None:
        return _of_whole(hashed, hashed.crc, rows, found.columns, units)
    return FileScan("", round(rows * max(1.0, file.size / max(seen, 1))), found.columns, Units.of(units))


def _buffered(file: File) -> _Hashed:
    """A stream of a file that is not compressed, of which little may be asked at a time."""
    system, path = open_filesystem(file.uri)
    return _Hashed(reader.buffered(system.open_input_stream(path, compression=None)), with_crc=True)


def _of_whole(hashed: _Hashed, crc: int, rows: int, columns: tuple[str, ...], units: Iterable[Unit]) -> FileScan:
    """The scan of a file whose units are checked by the CRC-32 of all that it has."""
    units = (dataclasses.replace(unit, after=crc) for unit in units)
    return FileScan(hashed.sha256.hexdigest(), rows, columns, Units.of(units))


# Scans that are kept: below the storage path there is one for each file, so an unchanged file is not read again.


BELIEVED_FROM = 64 * 2**20
"""Bytes from which a file is believed to be unchanged though its inode is another."""


def kept_scan(file: File, storage_root: str) -> FileScan | None:
    """The kept scan of a file; None if there is none, or the file has changed since."""
    if not (storage_root and file.modified) or (tree := read_sealed(_place(file, storage_root))) is None:
        return None
    if [tree.get("size"), tree.get("modified")] != [file.size, file.modified]:
        return None
    if file.size < BELIEVED_FROM and tree.get("state") != state_of(file):
        return None
    units = np.frombuffer(base64.b64decode(tree["units"]), dtype=UNIT)
    written = dataclasses.replace(file, kind=tree["kind"], encoding=tree["encoding"])
    return FileScan(tree["sha256"], tree["rows"], tuple(tree["columns"]), Units(units), written)


def kept_scans(files: Sequence[File], storage_root: str) -> list[FileScan | None]:
    """The kept scan of each of the files."""
    with ThreadPoolExecutor(16) as pool:  # in an object store each is a request
        return list(pool.map(lambda file: kept_scan(file, storage_root), files))


def state_of(file: File) -> list[int] | None:
    """Inode and the time of its last change, of a local file."""
    system, path = open_filesystem(file.uri)
    with contextlib.suppress(OSError):
        if system.type_name == "local":
            found = os.stat(path)
            return [found.st_ino, found.st_ctime_ns]
    return None


def keep_scan(file: File, storage_root: str, scan: FileScan, state: list[int] | None) -> None:
    """Keep a scan; `state` is that of the file before it was scanned.

    Not of a file that was changed less than 10 seconds ago: clocks of storages are coarse, and a file that changes
    twice within a tick shows one time.
    """
    if storage_root and file.modified and time.time() - file.modified / 1e9 >= 10:
        found = {
            "size": file.size,
            "modified": file.modified,
            "state": state,
            "kind": (scan.file or file).kind,
            "encoding": (scan.file or file).encoding,
            "sha256": scan.sha256,
            "rows": scan.rows,
            "columns": scan.columns,
            "units": base64.b64encode(scan.units.table.tobytes()).decode(),
        }
        storage.write_text(_place(file, storage_root), seal(found), durable=False)


def forget_scan(file: File, storage_root: str) -> None:
    """Drop the kept scan of a file that has other content, though size and time of change are the same."""
    if storage_root:
        storage.remove(_place(file, storage_root))


def _place(file: File, storage_root: str) -> str:
    # The number changes whenever a kept scan would be another.
    return storage.join(storage_root, "tokens", "scans", f"{digest(7, file.uri, length=32)}.json")
