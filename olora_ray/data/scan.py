"""Scan of a file in one pass: the digest of its content, and its units, each of which can be read on its own.

Scanning costs about as much as reading, so the results are kept.
"""

import base64
import csv
import dataclasses
import hashlib
import itertools
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from olora_ray.common import records, storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest
from olora_ray.data import reader
from olora_ray.data.reader import UNIT, FileScan, Unit, Units
from olora_ray.data.sources import Changed, File, steady
from olora_ray.data.text_files import BOM, DELIMITERS, as_written

# Files of lines: the offsets at which a unit may end, and the units, in one pass. Each of the next numbers decides
# which rows are shuffled together, so changing one changes the bytes of token stores.


CHUNK = 8 * 2**20
UNIT_ROWS = 256
# A small file has smaller units, so that it mixes evenly with others.
UNITS_WANTED = 64
UNIT_BYTES = 4 * 2**20
# Units of a file that can be read only from its start.
SLOW_UNITS = 8
SLOW_UNIT_BYTES = 32 * 2**20
# A larger text file is cut at line ends into several documents.
DOCUMENT_BYTES = 2**20
# Longest line or csv record: it is read at once, and a few MB of .gz unpack to gigabytes.
LINE_BYTES = 128 * 2**20
_BEGUN_ROW = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*("|\Z)')

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Marks:
    """The offsets at which a unit may end, each the end of a record; each array has one entry per mark."""

    records: Numbers
    """Records up to the mark."""
    lines: Numbers
    """Lines up to the mark."""
    offsets: Numbers
    """Bytes up to the mark."""
    crcs: Numbers
    """CRC-32 of these bytes."""
    skipped: int = 0
    """Records before the first row: the header of a csv file."""


def _mark_lines(stream: Any, file: File, limit: int | None) -> Marks:
    """Mark the lines of a stream, or of about its first `limit` bytes.

    Raise UserError for a line that is too long, and for a jsonl file that ends in the middle of a row.
    """
    parts: list[Numbers] = []
    total = lines = crc = line_start = document = 0
    open_line = b""
    at_end = False
    while limit is None or total < limit or not parts:
        chunk = stream.read(CHUNK)
        if not chunk:
            at_end = True
            break
        newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10)
        ends = newlines.astype(np.int64) + total + 1
        sizes = np.diff(ends, prepend=line_start)
        if len(ends):
            longest = int(sizes.argmax())
            if sizes[longest] > LINE_BYTES:
                raise _too_long(file, lines + 1 + longest)
        numbers = lines + 1 + np.arange(len(ends))
        if file.kind == "text":
            kept = _document_ends(ends, document)
        else:
            kept = np.flatnonzero(_may_end_units(numbers, sizes))
        crcs, crc = _running_crcs(chunk, ends[kept] - total, crc)
        if len(kept):
            parts.append(np.stack([numbers[kept], numbers[kept], ends[kept], crcs]))
            document = int(ends[kept[-1]])
        if len(ends):
            line_start = int(ends[-1])
            open_line = chunk[line_start - total :]
        else:
            open_line += chunk
        lines += len(ends)
        total += len(chunk)
        if total - line_start > LINE_BYTES:
            raise _too_long(file, lines + 1)
    marked = int(parts[-1][2, -1]) if parts else 0
    if at_end and marked < total:  # no newline at the end of the file
        if file.kind == "jsonl" and _is_cut_row(open_line):
            raise _cut_off(file, lines + 1)
        if total > line_start:
            lines += 1
        parts.append(np.array([[lines], [lines], [total], [crc]]))
    return _marks(parts)


def _marks(parts: list[Numbers], skipped: int = 0) -> Marks:
    records, lines, offsets, crcs = np.concatenate([np.zeros((4, 0), np.int64), *parts], axis=1)
    return Marks(records, lines, offsets, crcs, skipped)


def _too_long(file: File, line: int) -> UserError:
    problem = f"{file.uri}:{line}: a row of more than {LINE_BYTES >> 20} MiB; split or remove it"
    if file.kind not in ("jsonl", "text"):
        problem += " (is a quoted cell not closed?)"
    return UserError(problem)


def _is_cut_row(line: bytes) -> bool:
    """True if the last line of a jsonl file, which has no newline, begins an object that does not end."""
    if not _BEGUN_ROW.match(line):
        return False
    try:
        json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return error.msg != "Extra data"
    except UnicodeDecodeError:
        return True
    except (ValueError, RecursionError):
        pass  # the reader rejects the row and says why
    return False


def _cut_off(file: File, line: int) -> UserError:
    return UserError(
        f"{file.uri}:{line}: the file ends in the middle of a row: it is incomplete, or still being copied; copy it"
        " completely, then run the same command again"
    )


def _may_end_units(numbers: Numbers, sizes: Numbers) -> NDArray[np.bool_]:
    """Return which lines of a chunk may end a unit.

    A unit of a large file ends after each UNIT_ROWS lines, and anywhere in such a block if the block is large: so few
    marks are kept, which saves nearly all of the memory.
    """
    block = (numbers - 1) // UNIT_ROWS
    block -= block[:1].sum()
    large = np.bincount(block, weights=sizes) > UNIT_BYTES
    large[:1] = large[-1:] = True  # these blocks may continue in another chunk
    kept: NDArray[np.bool_] = (
        (numbers <= UNITS_WANTED * UNIT_ROWS) | (numbers % UNIT_ROWS == 0) | large[block]
    )
    return kept


def _document_ends(ends: Numbers, start: int) -> Numbers:
    indices = []
    while (index := int(np.searchsorted(ends, start + DOCUMENT_BYTES))) < len(ends):
        indices.append(index)
        start = int(ends[index])
    return np.array(indices, dtype=np.int64)


def _running_crcs(chunk: bytes, ends: Numbers, crc: int) -> tuple[Numbers, int]:
    view = memoryview(chunk)
    crcs = []
    start = 0
    for end in ends.tolist():
        crc = zlib.crc32(view[start:end], crc)
        crcs.append(crc)
        start = end
    return np.array(crcs, dtype=np.int64), zlib.crc32(view[start:], crc)


def _row_units(marks: Marks, file: File) -> Iterator[Unit]:
    if not len(marks.records) or marks.records[-1] <= marks.skipped:
        return
    lines = int(marks.lines[-1])
    if file.compression or file.encoding:
        step = -(-lines // _slow_units(lines, int(marks.offsets[-1]), SLOW_UNITS))
        if lines > UNITS_WANTED * UNIT_ROWS:
            # In a large file a unit may end at few lines only (`_may_end_units`).
            step = -(-step // UNIT_ROWS) * UNIT_ROWS
        most = 2 * SLOW_UNIT_BYTES
    else:
        step = int(np.clip(-(-lines // UNITS_WANTED) // 16 * 16, 16, UNIT_ROWS))
        most = UNIT_BYTES
    rows = marks.records - marks.skipped
    first = int(np.searchsorted(rows, 0, side="right"))
    cuts = np.flatnonzero((rows > 0) & (rows % step == 0))
    for cut in [*cuts.tolist(), len(rows) - 1]:
        while first <= cut:
            start = int(marks.offsets[first - 1]) if first else 0
            inside = marks.offsets[first : cut + 1]
            fitting = int(np.searchsorted(inside, start + most, side="right"))
            last = first + max(fitting, 1) - 1
            yield _unit(marks, first, last)
            first = last + 1


def _unit(marks: Marks, first: int, last: int) -> Unit:
    line = start = crc = 0
    if first:
        line = int(marks.lines[first - 1])
        start = int(marks.offsets[first - 1])
        crc = int(marks.crcs[first - 1])
    rows = int(marks.lines[last]) - line
    size = int(marks.offsets[last]) - start
    return Unit(line, rows, start, size, crc, int(marks.crcs[last]))


# The ends of the records of a csv or tsv file, as csv.reader itself tells them apart.


def _mark_records(stream: Any, file: File, limit: int | None) -> tuple[Marks, tuple[str, ...]]:
    """Mark the records of a stream, or of about its first `limit` bytes, and read the header.

    The header is the first record that is not blank, after a line `sep=;` of Excel. Raise UserError for a record that
    is too long, for a quoted cell that is never closed, and for a file that ends in the middle of a row.
    """
    source = _Lines(stream, file, limit)
    header: list[str] | None = None
    parts: list[Numbers] = []
    marks: list[tuple[int, int, int, int]] = []
    records = skipped = 0

    def keep_some() -> None:
        # Only the marks at which units may end are kept: for a large file this saves nearly all of the memory.
        part = np.array(marks, dtype=np.int64).reshape(-1, 4).T
        if header is not None:
            before = parts[-1][2, -1] if parts and parts[-1].size else 0
            part = part[:, _may_end_units(part[0] - skipped, np.diff(part[2], prepend=before))]
        parts.append(part)
        marks.clear()

    csv.field_size_limit(2**31 - 1)  # no limit here: LINE_BYTES limits a record
    try:
        for cells in csv.reader(source, delimiter=DELIMITERS[file.kind]):
            if source.ended:  # the lines have ended, but not the record
                if limit is None:
                    raise UserError(
                        f"{file.uri}:{source.record_line}: the record that begins here has a quoted cell that is not"
                        " closed; end the cell with a quote, and double each quote inside it"
                    )
                break
            if source.unfinished and header and 0 < len(cells) < len(header):
                raise _cut_off(file, source.record_line)
            if header is None:
                named = records == 0 and "".join(cells) == "sep="
                header = None if named else cells or None
                skipped = records + 1
            else:
                source.has_row = True
            records += 1
            marks.append((records, source.lines, source.total, source.crc))
            if len(marks) == 2**14:
                keep_some()
            source.begin_record()
    except csv.Error as error:
        raise UserError(
            f"{file.uri}:{source.record_line}: not a readable csv record: {error}"
        ) from None
    keep_some()
    names = (cell.encode("latin-1").decode("utf-8", "replace") for cell in header or ())
    return _marks(parts, skipped), tuple(names)


class _Lines:
    def __init__(self, stream: Any, file: File, limit: int | None) -> None:
        self.lines = 0
        self.total = 0
        self.crc = 0
        self.record_line = 1
        self._record_start = 0
        self.ended = False
        # True from the last line on if it has no line end.
        self.unfinished = False
        # A limit ends the lines only after the first row.
        self.has_row = False
        self._stream = stream
        self._file = file
        self._limit = limit

    def begin_record(self) -> None:
        self.record_line = self.lines + 1
        self._record_start = self.total

    def __iter__(self) -> Iterator[str]:
        for line in self._split():
            self.lines += 1
            self.total += len(line)
            self.crc = zlib.crc32(line, self.crc)
            if self.total - self._record_start > LINE_BYTES:
                raise _too_long(self._file, self.record_line)
            if self.lines == 1:
                line = line.removeprefix(BOM)
            # Latin-1 is fast and has a character for each byte; quotes, delimiters and line ends are those of UTF-8.
            yield line.decode("latin-1")
        self.ended = True

    def _split(self) -> Iterator[bytes]:
        rest = b""
        seen = 0
        while chunk := self._stream.read(CHUNK):
            seen += len(chunk)
            lines = (rest + chunk).splitlines(keepends=True)
            # The last line may continue in the next chunk, and so may "\r" with its "\n".
            rest = b""
            if not lines[-1].endswith(b"\n"):
                rest = lines.pop()
            yield from lines
            if len(rest) > LINE_BYTES:
                raise _too_long(self._file, self.record_line)
            if self._limit is not None and seen >= self._limit and self.has_row:
                return
        if rest:
            self.unfinished = not rest.endswith(b"\r")
            yield rest


def scan(file: File, storage_root: str, keep: bool = True) -> FileScan:
    """Scan a file, or return its kept scan; raise UserError for a broken file, and StoreUnavailable."""
    kept = kept_scan(file, storage_root)
    if kept is not None:
        return kept
    result = _scan(file)
    if keep:
        keep_scan(file, storage_root, result)
    return result


def head(file: File) -> FileScan:
    """Scan the beginning of a file: its first units, an estimate of its rows, no digest."""
    return dataclasses.replace(_scan(file, limit=CHUNK), sha256="")


def _scan(file: File, limit: int | None = None) -> FileScan:
    # With a limit, about so many bytes of a file of lines are read, and other files get no digest.
    try:
        result = storage.ask(file.uri, lambda *_: _scanned(file, limit))
    except FileNotFoundError:
        raise reader.not_here(file) from None
    except PermissionError:
        raise UserError(f"{file.uri}: no permission to read it") from None
    except UserError:
        raise
    except (*reader.UNREADABLE, ValueError) as error:
        raise reader.broken(file, error) from None
    for name, count in Counter(result.columns).items():
        if name and count > 1:
            raise UserError(
                f"{file.uri}: several columns are named {name!r}; give each column a different name"
            )
    return result


def _scanned(file: File, limit: int | None) -> FileScan:
    if file.kind not in ("text", "parquet", "arrow"):
        with reader.open_stream(file) as stream:
            kind, encoding = as_written(file.kind, bytes(stream.read(2**20)))
        file = dataclasses.replace(file, kind=kind, encoding=encoding)
    if file.kind == "json":
        hashed = _Hashed(reader.open_raw(file))
        with reader.unpacked(hashed, file) as stream:
            content = reader.read_whole(stream, file)
            hashed.finish()
        rows = len(reader.rows_of(file, content))
        units = _slices(0, rows, file.size, SLOW_UNITS)
        result = _of_whole(hashed, zlib.crc32(content), rows, (), units)
    elif file.kind in ("parquet", "arrow"):
        with steady(file):
            result = _parquet(file, limit) if file.kind == "parquet" else _arrow(file, limit)
    else:
        result = _lines(file, limit)
    return dataclasses.replace(result, file=file)


class _Hashed:
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
        # The digest covers all bytes of the file, also those after the last row.
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


def _lines(file: File, limit: int | None = None) -> FileScan:
    columns: tuple[str, ...] = ()
    hashed = _Hashed(reader.open_raw(file))
    with reader.unpacked(hashed, file) as stream:
        if file.kind in DELIMITERS:
            marks, columns = _mark_records(stream, file, limit)
        else:
            marks = _mark_lines(stream, file, limit)
        seen = hashed.bytes
        if limit is None:
            hashed.finish()
    if file.kind == "text":
        cuts = (_unit(marks, number, number) for number in range(len(marks.offsets)))
        documents = (
            dataclasses.replace(cut, first=number, rows=1) for number, cut in enumerate(cuts)
        )
        units = Units.of(documents)
    else:
        units = Units.of(_row_units(marks, file))
    rows = units.rows
    if limit is not None:
        rows = _estimated(rows, file, seen)
    return FileScan(hashed.sha256.hexdigest(), rows, columns, units)


def _estimated(rows: int, file: File, seen: int) -> int:
    return round(rows * max(1.0, file.size / max(seen, 1)))


def _slices(first: int, rows: int, size: int, wanted: int) -> Iterator[Unit]:
    count = _slow_units(rows, size, wanted)
    borders = [rows * number // count for number in range(count + 1)]
    for low, high in itertools.pairwise(borders):
        if high > low:
            yield Unit(first + low, high - low, 0, size * (high - low) // rows)


def _slow_units(rows: int, size: int, wanted: int) -> int:
    return max(min(wanted, rows // UNIT_ROWS), -(-size // SLOW_UNIT_BYTES), 1)


def _parquet(file: File, limit: int | None) -> FileScan:
    system, path = storage.filesystem(file.uri)
    with system.open_input_file(path) as stream:
        opened = parquet.ParquetFile(stream)
        columns = tuple(opened.schema_arrow.names)
        count = opened.metadata.num_row_groups
        units: list[Unit] = []
        start = 0
        for number in range(count):
            group = opened.metadata.row_group(number)
            rows = group.num_rows
            units.extend(_slices(start, rows, group.total_byte_size, -(-SLOW_UNITS // count)))
            start += rows
    if limit is not None:
        return FileScan("", start, columns, Units.of(units))
    with _buffered(file) as hashed:
        hashed.finish()
    return _of_whole(hashed, hashed.crc, start, columns, units)


def _arrow(file: File, limit: int | None) -> FileScan:
    with _buffered(file) as hashed:
        batches = reader.look(hashed, lambda: hashed.bytes, limit)
        seen = hashed.bytes
        if limit is None:
            hashed.finish()
    rows = sum(batches.rows)
    if limit is None:
        units = batches.placed(_slices(0, rows, file.size, UNITS_WANTED))
        return _of_whole(hashed, hashed.crc, rows, batches.columns, units)
    units = batches.placed(_slices(0, rows, seen, UNITS_WANTED))
    return FileScan("", _estimated(rows, file, seen), batches.columns, Units.of(units))


def _buffered(file: File) -> _Hashed:
    # Little may be asked at a time, and in an object store each read is a request.
    return _Hashed(reader.buffered(reader.open_raw(file)), with_crc=True)


def _of_whole(
    hashed: _Hashed, crc: int, rows: int, columns: tuple[str, ...], units: Iterable[Unit]
) -> FileScan:
    units = (dataclasses.replace(unit, after=crc) for unit in units)
    return FileScan(hashed.sha256.hexdigest(), rows, columns, Units.of(units))


# Kept scans: one per file below the storage path, so that an unchanged file is not read again.


def kept_scan(file: File, storage_root: str) -> FileScan | None:
    """Return the kept scan of a file; None if there is none, or the file has changed since."""
    if not storage_root or not file.modified:
        return None
    tree = records.read(_kept_path(file, storage_root), dict[str, Any], True)
    if tree is None or [tree.get("size"), tree.get("modified")] != [file.size, file.modified]:
        return None
    units = np.frombuffer(base64.b64decode(tree["units"]), dtype=UNIT)
    written = dataclasses.replace(file, kind=tree["kind"], encoding=tree["encoding"])
    return FileScan(tree["sha256"], tree["rows"], tuple(tree["columns"]), Units(units), written)


def kept_scans(files: Sequence[File], storage_root: str) -> list[FileScan | None]:
    with ThreadPoolExecutor(16) as pool:  # in an object store each is a request
        return list(pool.map(lambda file: kept_scan(file, storage_root), files))


def keep_scan(file: File, storage_root: str, scan: FileScan) -> None:
    """Keep a scan.

    A file that changed less than 10 seconds ago is not kept: clocks of storages are coarse, and two changes within
    one tick show the same time.
    """
    if not storage_root or not file.modified or time.time() - file.modified / 1e9 < 10:
        return
    written = scan.file or file
    tree = {
        "size": file.size,
        "modified": file.modified,
        "kind": written.kind,
        "encoding": written.encoding,
        "sha256": scan.sha256,
        "rows": scan.rows,
        "columns": scan.columns,
        "units": base64.b64encode(scan.units.table.tobytes()).decode(),
    }
    records.write(_kept_path(file, storage_root), tree, sealed=True, durable=False)


def forget_changed(error: UserError, storage_root: str) -> None:
    """Drop the kept scan of a file if the error says that its content has changed, though size and time have not."""
    if isinstance(error, Changed) and storage_root:
        storage.remove(_kept_path(error.file, storage_root))


def _kept_path(file: File, storage_root: str) -> str:
    # Raise the number whenever a new scan would differ from a kept one.
    return storage.join(storage_root, "tokens", "scans", f"{digest(8, file.uri, length=32)}.json")
