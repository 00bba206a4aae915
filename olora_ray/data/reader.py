"""Readers of files: each yields the raw rows of a piece of a file, with their places in it.

A place is a line (from 0) in jsonl and csv, and a row (from 0) elsewhere. Files of lines are read by
byte ranges of their uncompressed content, the others by row numbers. What is read is what the scan saw: files of
lines and json files are checked by CRC-32, the others by size and time of change, and by CRC-32 where these differ.
"""

import contextlib
import csv
import errno
import io
import itertools
import json
import lzma
import os
import shutil
import socket
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc, parquet

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import StoreUnavailable, UserError, first_line
from olora_ray.common.storage import digest
from olora_ray.data.formats import Rejected
from olora_ray.data.sources import Changed, File, as_scanned, asked, open_filesystem
from olora_ray.data.text_files import BOM, DELIMITERS

# Units: the smallest pieces of files that are read at once, in arrays of 40 bytes each; and the scan of a file.


UNIT = np.dtype(
    {
        "names": ["first", "rows", "offset", "size", "before", "after", "file"],
        "formats": ["<i8", "<u4", "<i8", "<i8", "<u4", "<u4", "<u4"],
    }
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
    file: File | None = None
    """The file as it is written; None: as its name says."""


def as_unit(entry: Any) -> Unit:
    """The unit of an entry of an array."""
    return Unit(*entry.item()[:6])


# Files of Arrow's stream form, as `datasets` saves them: where their batches begin, and reading from one of them on.


@dataclass
class Batches:
    """Where the batches of a file begin."""

    columns: tuple[str, ...]
    rows: list[int] = field(default_factory=list)
    """Of each batch."""
    offsets: list[int] = field(default_factory=list)
    """First byte of each; empty if they cannot be read from the middle on."""

    def placed(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units with the places of their first batches."""
        starts = [0, *accumulate(self.rows)]
        for unit in units:
            number = bisect_right(starts, unit.first) - 1
            place = (self.offsets[number], unit.first - starts[number]) if self.offsets else (0, 0)
            yield replace(unit, offset=place[0], before=place[1])


def look(stream: Any, position: Callable[[], int], most: int | None) -> Batches:
    """Read a stream of which `position` tells how much has been read: all of it, or about `most` bytes."""
    reader = ipc.open_stream(pa.PythonFile(stream, mode="r"))
    found = Batches(tuple(reader.schema.names))
    offsets = [position()]
    raw = pa.schema([each.with_type(_as_bytes(each.type)) for each in reader.schema])
    for batch in reader:
        # Reading values at damaged offsets kills the process. Letters are looked at row by row (`rows`).
        batch.validate()
        batch.cast(raw).validate(full=True)
        found.rows.append(batch.num_rows)
        offsets.append(position())
        if most is not None and position() >= most:
            break
    # The values of a dictionary stand before the first batch alone.
    if not any(map(_has_dictionary, reader.schema.types)):
        found.offsets = offsets[:-1]
    return found


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of texts, in objects and lists too."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(_as_bytes(each.type)) for each in kind])
    return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type))) if pa.types.is_list(kind) else kind


def _has_dictionary(kind: pa.DataType) -> bool:
    parts = (kind.field(number).type for number in range(kind.num_fields))
    return pa.types.is_dictionary(kind) or any(map(_has_dictionary, parts))


@contextlib.contextmanager
def opened(file: File, unit: Unit) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema of a file, and its batches from the first of the unit on; from its start where that is not known."""
    system, path = open_filesystem(file.uri)
    with pa.memory_map(path) if system.type_name == "local" else system.open_input_file(path) as stream:
        # Of a unit in the middle the schema alone is read from the start.
        reader = ipc.open_stream(buffered(stream, 2**16 if unit.offset else 2**20))
        if not unit.offset:
            yield reader.schema, iter(reader)
            return
        stream.seek(unit.offset)
        yield reader.schema, _messages(buffered(stream, max(2**16, min(unit.size, 2**20))), reader.schema)


def _messages(stream: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with contextlib.suppress(EOFError):
        while True:
            yield ipc.read_record_batch(ipc.read_message(stream), schema)


def buffered(stream: Any, at_once: int = 2**20) -> Any:
    """A stream that asks for so many bytes at a time: in a bucket each read is a request."""
    if isinstance(stream, pa.MemoryMappedFile):
        return stream
    return pa.BufferedInputStream(_native(stream), at_once)


# Rows of an Arrow batch, as plain values of Python.


def rows(batch: Any) -> list[Any]:
    """The rows of a batch; one with a text that is none is rejected alone: Arrow looks at texts only here."""
    names = batch.schema.names
    try:
        return [dict(zip(names, row, strict=True)) for row in zip(*map(_values, batch.columns), strict=True)]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [Rejected("not_utf8", "not UTF-8 text")]
        return [row for number in range(batch.num_rows) for row in rows(batch.slice(number, 1))]


def _values(column: Any) -> list[Any]:
    try:
        found = column.to_pylist()
        return [_with_objects(value, column.type) for value in found] if _has_maps(column.type) else found
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError, LookupError) as error:  # a time that Python has not, such as year 10000
        return [f"<{first_line(error)}>"] * len(column)


def _has_maps(kind: Any) -> bool:
    return pa.types.is_map(kind) or any(_has_maps(kind.field(number).type) for number in range(kind.num_fields))


def _with_objects(value: Any, kind: Any) -> Any:
    """A value of an Arrow type with its maps as objects; Spark makes one of each dict, pyarrow pairs of each."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        return {key: _with_objects(each, kind.item_type) for key, each in value}
    if pa.types.is_struct(kind):
        inner = {field.name: field.type for field in kind}
        return {name: _with_objects(each, inner[name]) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_objects(each, kind.value_type) for each in value]
    return value


# json files: read as a whole, up to a limit.


JSON_BYTES = 2**30
"""Largest json file, uncompressed: as many processes as prepare it hold it, and its rows take several times more."""


def read_whole(stream: Any, file: File) -> bytes:
    """The content of a json file; raises UserError for one that is too large to be read as a whole."""
    content: bytes = stream.read(JSON_BYTES + 1)
    if len(content) > JSON_BYTES:
        raise UserError(
            f"{file.uri}: more than {JSON_BYTES >> 20} MiB of JSON, which is read as a whole;"
            " write it as .jsonl, with one object a line"
        )
    return content


def rows_of(file: File, content: bytes) -> list[Any]:
    """The rows of a json file: a list of them, or an object of columns; raises UserError for anything else."""
    try:
        tree = json.loads(content.removeprefix(BOM).decode())
    except json.JSONDecodeError as error:
        raise UserError(f"{file.uri}:{error.lineno}: broken JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file.uri}: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{file.uri}: broken JSON: nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python takes
        raise UserError(f"{file.uri}: broken JSON: {first_line(error)}") from None
    except MemoryError:
        raise UserError(
            f"{file.uri}: not enough memory for its {len(content) / 1e6:,.0f} MB of JSON, which are read as a whole;"
            " write it as .jsonl, with one object a line"
        ) from None
    if isinstance(tree, list):
        return tree
    parts = list(tree.values()) if isinstance(tree, dict) else []
    if parts and all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        # As pandas writes them, rows by their numbers: either in each column, or each with its columns.
        by_number = [all(map(str.isdigit, names)) for names in (tree, parts[0])]
        if by_number == [True, False]:
            return parts
        if by_number == [False, True]:
            parts = [list(part.values()) for part in parts]
    if parts and all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        return [dict(zip(tree, values, strict=True)) for values in zip(*parts, strict=True)]
    raise UserError(f"{file.uri}: expected a list of rows, or an object of columns of equal length")


# Copies of large compressed files, uncompressed: made once on a node, instead of a pass up to each unit.


WORTH_IT = 256 * 2**20
"""Bytes before a unit from which on a copy is made: tokenising takes several hundred times as long as decompressing."""


def _copy(file: File) -> Path | None:
    """This node's copy of a file; None where the disk has no room for it."""

    def unpack(partial: Path) -> None:
        folder = partial.parent
        node_cache.make_room(folder, folder.glob("*.raw"))
        if shutil.disk_usage(folder).free < 10 * file.size:  # compressed text is three to ten times smaller
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open_stream(file) as stream, partial.open("wb") as copy:
            shutil.copyfileobj(stream, copy, 2**23)

    try:
        folder = storage.private_folder("olora_ray") / "unpacked"
        return node_cache.cached(folder / f"{digest(file.uri, file.size, file.modified, length=32)}.raw", unpack)
    except OSError:  # a full disk, no folder; a file that cannot be read is told by whoever reads it without a copy
        return None


# Rows of a unit, of each kind of file.


BATCH = 256
"""Rows that are asked for at a time."""
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
    """The content as a stream, uncompressed and in UTF-8; `wrap` sees the bytes as they lie on disk."""
    system, path = open_filesystem(file.uri)
    raw = wrap(system.open_input_stream(path, compression=None))
    if file.compression == "xz":
        raw = lzma.LZMAFile(raw)  # noqa: SIM115 - closed by whoever closes the stream
    elif file.compression:
        raw = pa.CompressedInputStream(_native(raw), file.compression)
    return pa.transcoding_input_stream(_native(raw), file.encoding, "utf-8") if file.encoding else raw


def _native(stream: Any) -> pa.NativeFile:
    return stream if isinstance(stream, pa.NativeFile) else pa.PythonFile(stream, mode="r")


def _bytes(file: File, unit: Unit) -> bytes:
    """The bytes of a unit of lines; raises Changed if they are not those that the scan saw."""
    content = _range(file, unit)
    if zlib.crc32(content, unit.before) != unit.after:
        raise Changed(file)
    return content


def _range(file: File, unit: Unit) -> bytes:
    if file.compression is None and file.encoding is None:
        system, path = open_filesystem(file.uri)
        with system.open_input_file(path) as stream:
            stream.seek(unit.offset)
            return bytes(stream.read(unit.size))
    if unit.offset >= WORTH_IT and (kept := _copy(file)) is not None:
        with contextlib.suppress(FileNotFoundError), kept.open("rb") as copy:
            copy.seek(unit.offset)
            content = copy.read(unit.size)
            if zlib.crc32(content, unit.before) == unit.after:
                return content
            kept.unlink()  # it is damaged, or of other content
    with open_stream(file) as stream:
        left = unit.offset
        while left > 0 and (skipped := len(stream.read(min(2**23, left)))):
            left -= skipped
        return bytes(stream.read(unit.size))


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
    csv.field_size_limit(2**31 - 1)  # none: the scan has its own
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
        yield unit.first, Rejected("not_utf8", "not UTF-8 text; a table is called .csv")


def _json(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    with open_stream(file) as stream:
        content = read_whole(stream, file)
    if zlib.crc32(content) != unit.after:
        raise Changed(file)
    yield from enumerate(rows_of(file, content)[unit.first : unit.first + unit.rows], unit.first)


def _parquet(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    system, path = open_filesystem(file.uri)
    with as_scanned(file, unit.after), system.open_input_file(path) as stream:
        metadata, starts = _row_groups(file, unit.after)
        table = parquet.ParquetFile(stream, buffer_size=2**20, metadata=metadata)
        group = bisect_right(starts, unit.first) - 1
        batches = table.iter_batches(BATCH, row_groups=[group], columns=_present(table.schema_arrow, columns))
        yield from _slice(file, batches, starts[group], unit)


@lru_cache(maxsize=4)
def _row_groups(file: File, crc: int) -> tuple[parquet.FileMetaData, list[int]]:
    """What stands at the end of a parquet file, and the first row of each row group: of 2,000 groups it takes long."""
    system, path = open_filesystem(file.uri)
    with system.open_input_file(path) as stream:
        found = parquet.ParquetFile(stream).metadata
    sizes = (found.row_group(group).num_rows for group in range(found.num_row_groups))
    return found, list(accumulate(sizes, initial=0))[:-1]


def _arrow(file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]) -> Iterator[Located]:
    start = unit.first - unit.before if unit.offset else 0
    with as_scanned(file, unit.after), opened(file, unit) as (schema, batches):
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
            yield from enumerate(rows(batch.slice(low, high - low)), start + low)
        start += batch.num_rows
    if start < stop:
        raise Changed(file)


READERS: dict[str, Callable[[File, Unit, Sequence[str], Sequence[str]], Iterator[Located]]] = {
    "jsonl": _jsonl,
    **dict.fromkeys(DELIMITERS, _csv),
    "text": _text,
    "json": _json,
    "parquet": _parquet,
    "arrow": _arrow,
}
