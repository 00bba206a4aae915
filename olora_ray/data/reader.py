"""Readers of files: each yields the raw rows of a piece of a file, with their places in it.

A place is a line (from 0) in jsonl and csv, and a row (from 0) elsewhere. Files of lines are read by
byte ranges of their uncompressed content, the others by row numbers. What is read is what the scan saw: files of
lines and json files are checked by CRC-32, the others by size and time of change, and by CRC-32 where these differ.
"""

import contextlib
import csv
import io
import itertools
import json
import lzma
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from olora_ray.common.errors import StoreUnavailable, UserError, first_line
from olora_ray.data import arrow_stream, arrow_values, unpacked
from olora_ray.data.addresses import asked, open_filesystem
from olora_ray.data.example import Rejected
from olora_ray.data.json_file import BOM, read_whole, rows_of
from olora_ray.data.sources import File
from olora_ray.data.unchanged import Changed, as_scanned
from olora_ray.data.units import Unit

BATCH = 256
"""Rows that are asked for at a time."""
SKIP = 8 * 2**20
"""Bytes at a time when a compressed file is read up to the piece that is wanted."""
CELL_LIMIT = 2**31 - 1
"""Limit of csv.reader, which is of the whole process: none, since the scan has its own."""
DELIMITERS = {"csv": ",", "tsv": "\t"}
ESCAPED = '\\"'
UNREADABLE = (pa.ArrowInvalid, OSError, EOFError, lzma.LZMAError)
"""What a damaged container or compression raises."""


Located = tuple[int, Any]
"""Place and row; the row is a `Rejected` if it could not be read."""


def read_unit(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    """The rows of a unit.

    `header` names the columns of a csv file; of files that have columns only `columns` are read.
    Raises UserError for a file that is broken as a whole, Changed if it is not what the scan saw, and StoreUnavailable.
    """
    try:
        yield from _patiently(file.uri, lambda: READERS[file.kind](file, unit, header, columns))
    except FileNotFoundError:
        raise not_here(file) from None
    except UNREADABLE as error:
        raise broken(file, error) from None


def _patiently(uri: str, read: Callable[[], Iterator[Located]]) -> Iterator[Located]:
    """The rows that `read` gives; where an object store fails on the way they are read anew, up to where they were."""
    rows: Iterator[Located] | None = None
    done = 0

    def more() -> list[Located]:
        nonlocal rows
        rows = itertools.islice(read(), done, None) if rows is None else rows
        try:
            return list(itertools.islice(rows, BATCH))
        except Exception:
            rows = None
            raise

    while some := asked(uri, more):
        yield from some
        done += len(some)


def not_here(file: File) -> UserError:
    """The message for a file that the driver has listed, and this process, on another node perhaps, does not find."""
    return UserError(
        f"{file.uri}: not there on node {socket.gethostname()}: it is gone since it was listed, or not every node sees"
        " it by this path; put it where all nodes do"
    )


def broken(file: File, error: Exception) -> UserError | StoreUnavailable:
    """The error for a file whose container or compression is damaged, or whose store does not answer."""
    if isinstance(error, StoreUnavailable):
        return StoreUnavailable(f"{file.uri}: {error}")
    kind = file.compression or file.kind
    return UserError(f"{file.uri}: not a readable {kind} file: {first_line(error)}")


def open_stream(file: File, wrap: Callable[[Any], Any] = lambda stream: stream) -> Any:
    """The uncompressed content as a stream; `wrap` sees the bytes as they lie on disk."""
    system, path = open_filesystem(file.uri)
    raw = wrap(system.open_input_stream(path, compression=None))
    if file.compression is None:
        return raw
    if file.compression == "xz":
        return lzma.LZMAFile(raw)
    return pa.CompressedInputStream(
        raw if isinstance(raw, pa.NativeFile) else pa.PythonFile(raw, mode="r"), file.compression
    )


def _bytes(file: File, unit: Unit) -> bytes:
    """The bytes of a unit of lines; raises Changed if they are not those that the scan saw."""
    content = _range(file, unit)
    if zlib.crc32(content, unit.before) != unit.after:
        raise Changed(file)
    return content


def _range(file: File, unit: Unit) -> bytes:
    if file.compression is None:
        system, path = open_filesystem(file.uri)
        with system.open_input_file(path) as stream:
            stream.seek(unit.offset)
            return bytes(stream.read(unit.size))
    if (found := _from_copy(file, unit)) is not None:
        return found
    with open_stream(file) as stream:
        left = unit.offset
        while left > 0 and (skipped := len(stream.read(min(SKIP, left)))):
            left -= skipped
        return bytes(stream.read(unit.size))


def _from_copy(file: File, unit: Unit) -> bytes | None:
    """The bytes of a unit from this node's copy of a compressed file; None if there is none with the right bytes."""
    path = unpacked.find(file)
    if path is None and unit.offset >= unpacked.WORTH_IT:
        with open_stream(file) as stream:
            path = unpacked.make(file, stream)
    if path is None:
        return None
    with contextlib.suppress(FileNotFoundError), path.open("rb") as copy:
        copy.seek(unit.offset)
        content = copy.read(unit.size)
        if zlib.crc32(content, unit.before) == unit.after:
            return content
        unpacked.drop(file)
    return None


def _jsonl(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    for number, line in enumerate(_bytes(file, unit).split(b"\n")):
        if number + unit.first == 0:
            line = line.removeprefix(BOM)
        if line.strip():
            yield unit.first + number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as error:
        return Rejected("broken_json", f"{error.msg} (column {error.colno})")
    except UnicodeDecodeError:
        return Rejected("not_utf8", "not UTF-8 text")
    except RecursionError:
        return Rejected("broken_json", "nested too deeply")
    except ValueError as error:  # a number of more digits than Python takes
        return Rejected("broken_json", first_line(error))


def _csv(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    csv.field_size_limit(CELL_LIMIT)
    text = _bytes(file, unit).decode("utf-8", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[file.kind])
    lines = list(io.StringIO(text, newline="")) if ESCAPED in text else []
    start = 0
    for cells in reader:
        place, first, start = unit.first + start, start, reader.line_num
        if not cells:
            continue
        if len(cells) != len(header):
            yield place, Rejected("broken_csv", f"{len(cells)} cells, but the header has {len(header)}")
        elif lines and (problem := _strictly("".join(lines[first:start]), file)):
            yield place, problem
        elif not all(map(_is_utf8, cells)):
            yield place, Rejected("not_utf8", "not UTF-8 text")
        else:
            yield place, dict(zip(header, cells, strict=True))


def _strictly(record: str, file: File) -> Rejected | None:
    """What is wrong with a record that csv.reader reads all the same: a quoted cell that ends before its end.

    Spark and MySQL write a quote inside a quoted cell with a backslash, where csv has it doubled.
    """
    if ESCAPED not in record:
        return None
    try:
        list(csv.reader(io.StringIO(record, newline=""), delimiter=DELIMITERS[file.kind], strict=True))
    except csv.Error:
        return Rejected("broken_csv", f'a quote inside a quoted cell is written as {ESCAPED}, not doubled as ""')
    return None


def _is_utf8(cell: str) -> bool:
    """Whether a cell has no half surrogate, by which "surrogateescape" stands for a byte that is not UTF-8."""
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    content = _bytes(file, unit)
    try:
        yield unit.first, {"text": content.removeprefix(BOM if unit.offset == 0 else b"").decode()}
    except UnicodeDecodeError:
        yield unit.first, Rejected("not_utf8", "not UTF-8 text")


def _json(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    with open_stream(file) as stream:
        content = read_whole(stream, file)
    if zlib.crc32(content) != unit.after:
        raise Changed(file)
    yield from enumerate(rows_of(file, content)[unit.first : unit.first + unit.rows], unit.first)


def _parquet(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    system, path = open_filesystem(file.uri)
    with as_scanned(file, unit.after), system.open_input_file(path) as stream:
        table = parquet.ParquetFile(stream, buffer_size=2**20)
        start = 0
        for group in range(table.metadata.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if start <= unit.first < start + size:
                batches = table.iter_batches(BATCH, row_groups=[group], columns=_present(table.schema_arrow, columns))
                yield from _slice(file, batches, start, unit)
            start += size


def _arrow(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    # Scans that were kept by an earlier version know of no place: then the file is read from its start.
    start = unit.first - unit.before if unit.offset else 0
    with as_scanned(file, unit.after), arrow_stream.opened(file, unit) as (schema, batches):
        present = _present(schema, columns)
        yield from _slice(file, (batch.select(present) for batch in batches), start, unit)


def _present(schema: Any, columns: Sequence[str]) -> list[str]:
    """The wanted columns; all if none is there, so that the message about it can name them."""
    present = [name for name in columns if name in schema.names]
    return present or list(schema.names)


def _slice(file: File, batches: Any, start: int, unit: Unit) -> Iterator[Located]:
    """The rows of a unit, of batches from row `start` on; raises Changed where they end before it does."""
    stop = unit.first + unit.rows
    for batch in batches:
        if start >= stop:
            return
        low, high = max(unit.first - start, 0), min(stop - start, batch.num_rows)
        if low < high:
            yield from enumerate(arrow_values.rows(batch.slice(low, high - low)), start + low)
        start += batch.num_rows
    if start < stop:
        raise Changed(file)


READERS: dict[str, Callable[[File, Unit, Sequence[str], Sequence[str]], Iterator[Located]]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": _csv,
    "text": _text,
    "json": _json,
    "parquet": _parquet,
    "arrow": _arrow,
}
