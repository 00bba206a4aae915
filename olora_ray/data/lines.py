"""Files of lines (jsonl, text): where a unit may end, and the units; found in one pass. csv has csv_records.py.

At each such place the CRC-32 of everything before it is noted, so that a unit that is read later is known to be
what was seen here: `zlib.crc32(unit, crc before it) == crc after it`.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError
from olora_ray.data.sources import File
from olora_ray.data.units import Unit

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
