"""Records of a csv or tsv file: where they end, as csv.reader itself tells them apart.

Lines are counted as csv.reader does: they end with LF, CR or CR LF, inside quotes too.
"""

import csv
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from olora_ray.common.errors import UserError
from olora_ray.data import lines, reader
from olora_ray.data.json_file import BOM
from olora_ray.data.lines import Marks
from olora_ray.data.sources import File


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
                raise lines.cut_off(file, source.record_line)
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
            if self.total - self._record_start > lines.LINE_BYTES:
                raise lines.too_long(self._file, self.record_line)
            # Latin-1 is fast and has a letter for each byte; quotes, delimiters and line ends are those of UTF-8.
            yield (line.removeprefix(BOM) if self.lines == 1 else line).decode("latin-1")
        self.ended = True

    def _split(self) -> Iterator[bytes]:
        rest, seen = b"", 0
        while chunk := self._stream.read(lines.CHUNK):
            seen += len(chunk)
            found = (rest + chunk).splitlines(keepends=True)
            # The last line may go on in the next chunk, and so may "\r" with its "\n".
            rest = b"" if found[-1].endswith(b"\n") else found.pop()
            yield from found
            if len(rest) > lines.LINE_BYTES:
                raise lines.too_long(self._file, self.record_line)
            lines.check_count(self.lines, self._file)
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
        if (self.records - self.skipped) % lines.UNIT_ROWS == 0:
            many = self.records - self.skipped > lines.UNITS_WANTED * lines.UNIT_ROWS
            if many and not self._all and source.total - self._block_start <= lines.UNIT_BYTES:
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
