"""Readers of files: each yields the raw rows of a unit of a file, with their positions.

A position is a line (from 0) in jsonl and csv files, and a row (from 0) elsewhere. Files of lines are read by byte
ranges of their uncompressed content, the others by row numbers. Each read checks that the file is what the scan saw:
files of lines and json files by CRC-32, the others by size and modification time, and by CRC-32 if these differ.
"""

import contextlib
import csv
import errno
import io
import itertools
import json
import lzma
import os
import re
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
from olora_ray.data.formats.format import Rejected, named
from olora_ray.data.sources import Changed, File, as_scanned
from olora_ray.data.text_files import BOM, DELIMITERS, NULLS

# Units, the smallest pieces of files that are read at once, in arrays with 40 bytes per unit; and the scan of a file.


# A unit in an array: the fields of `Unit`, and the number of its file if the array holds units of several files.
UNIT = np.dtype(
    {
        "names": ["first", "rows", "offset", "size", "before", "after", "file"],
        "formats": ["<i8", "<u4", "<i8", "<i8", "<u4", "<u4", "<u4"],
    }
)
# Array of UNIT.
Table = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of a file that is read at once."""

    first: int
    """Position of the first row."""
    rows: int
    """Blank lines included."""
    offset: int
    """Files of lines: the first byte. Arrow files: the first byte of the batch with the first row. Others: 0."""
    size: int
    """Uncompressed bytes; an estimate if the borders of rows are known only after reading."""
    before: int = 0
    """Files of lines: CRC-32 of everything before the unit. Arrow files: rows of that batch before the unit. Others:
    0."""
    after: int = 0
    """Files of lines: CRC-32 of everything up to the unit's end. Others: of the whole uncompressed file."""

    @property
    def end(self) -> int:
        return self.offset + self.size


class Units(Sequence[Unit]):
    """The units of a file: a sequence of `Unit`, kept as an array."""

    def __init__(self, table: Table) -> None:
        self.table = table

    @classmethod
    def of(cls, units: Iterable[Unit]) -> "Units":
        return cls(np.fromiter(((*astuple(unit), 0) for unit in units), dtype=UNIT))

    @staticmethod
    def joined(parts: "Sequence[Units]") -> Table:
        """Return the units of several files, with the numbers of the files."""
        table = np.concatenate([np.empty(0, UNIT), *(part.table for part in parts)])
        table["file"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return table

    @property
    def rows(self) -> int:
        return int(self.table["rows"].sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> "Units": ...
    def __getitem__(self, index: int | slice) -> "Unit | Units":
        if isinstance(index, slice):
            return Units(self.table[index])
        return _as_unit(self.table[index])

    def __iter__(self) -> Iterator[Unit]:
        return map(_as_unit, self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Units) and np.array_equal(self.table, other.table)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class FileScan:
    sha256: str
    rows: int
    """Blank lines included."""
    columns: tuple[str, ...]
    """Names of the columns if the file has a header or schema."""
    units: Units
    file: File | None = None
    """The file with the type and encoding of its content; None: those of its name."""


def _as_unit(entry: Any) -> Unit:
    return Unit(*entry.item()[:6])


# Files in Arrow's stream format, as `datasets` saves them: the offsets of their batches, and reading from a batch on.


@dataclass
class Batches:
    columns: tuple[str, ...]
    rows: list[int] = field(default_factory=list)
    """Rows per batch."""
    offsets: list[int] = field(default_factory=list)
    """First byte of each batch; empty if the file can be read only from its start."""

    def placed(self, units: Iterable[Unit]) -> Iterator[Unit]:
        starts = [0, *accumulate(self.rows)]
        for unit in units:
            if self.offsets:
                number = bisect_right(starts, unit.first) - 1
                before = unit.first - starts[number]
                unit = replace(unit, offset=self.offsets[number], before=before)
            yield unit


def look(stream: Any, position: Callable[[], int], most: int | None) -> Batches:
    """Read the batches of a stream: all of them, or those of about the first `most` bytes.

    `position` returns how many bytes have been read.
    """
    reader = ipc.open_stream(pa.PythonFile(stream, mode="r"))
    batches = Batches(tuple(reader.schema.names))
    offsets = [position()]
    for batch in reader:
        batch.validate(full=True)  # reading values at damaged offsets would kill the process
        batches.rows.append(batch.num_rows)
        offsets.append(position())
        if most is not None and position() >= most:
            break
    # A dictionary's values are stored before the first batch only, so reading cannot begin in the middle.
    if not any(map(_has_dictionary, reader.schema.types)):
        batches.offsets = offsets[:-1]
    return batches


def _has_dictionary(type_: pa.DataType) -> bool:
    parts = (type_.field(number).type for number in range(type_.num_fields))
    return pa.types.is_dictionary(type_) or any(map(_has_dictionary, parts))


@contextlib.contextmanager
def opened(file: File, unit: Unit) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yield a file's schema and its batches, from the unit's first batch on if its offset is known."""
    system, path = storage.filesystem(file.uri)
    if system.type_name == "local":
        opening = pa.memory_map(path)
    else:
        opening = system.open_input_file(path)
    with opening as stream:
        if not unit.offset:
            reader = ipc.open_stream(buffered(stream))
            yield reader.schema, iter(reader)
            return
        # Only the schema is read from the start, so a small buffer is enough. The reader stays, because its end would
        # close the stream.
        reader = ipc.open_stream(buffered(stream, 2**16))
        stream.seek(unit.offset)
        messages = _messages(buffered(stream, max(2**16, min(unit.size, 2**20))), reader.schema)
        yield reader.schema, messages


def _messages(stream: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with contextlib.suppress(EOFError):
        while True:
            yield ipc.read_record_batch(ipc.read_message(stream), schema)


def buffered(stream: Any, at_once: int = 2**20) -> Any:
    """Return a stream that reads `at_once` bytes at a time: in an object store each read is a request."""
    if isinstance(stream, pa.MemoryMappedFile):
        return stream
    return pa.BufferedInputStream(_native(stream), at_once)


# Rows of an Arrow batch, as plain values of Python.


def rows(batch: Any) -> list[Any]:
    """Return the rows of a batch, with a Rejected in place of each row whose text is not UTF-8.

    Arrow checks texts only when they are converted, which happens here.
    """
    names = batch.schema.names
    labels = _names_of_labels((batch.schema.metadata or {}).get(b"huggingface", b""))
    try:
        columns = [_values(column) for column in batch.columns]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [Rejected("not_utf8", "not UTF-8 text")]
        singles = (rows(batch.slice(number, 1)) for number in range(batch.num_rows))
        return list(itertools.chain.from_iterable(singles))
    for number, name in enumerate(names):
        if name in labels:
            columns[number] = [named(value, labels[name]) for value in columns[number]]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


@lru_cache(8)
def _names_of_labels(metadata: bytes) -> dict[str, list[str]]:
    # `datasets` notes in the schema which columns are numbers of labels, and what the labels are called.
    labels = {}
    with contextlib.suppress(ValueError, LookupError, TypeError):
        for column, feature in json.loads(metadata)["info"]["features"].items():
            if isinstance(feature, dict):
                label = feature.get("feature")  # of a list of labels
                if not isinstance(label, dict):
                    label = feature
                labels[column] = label.get("names")
    return {column: names for column, names in labels.items() if names}


def _values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError, LookupError) as error:
        # A time that Python does not have, such as year 10000.
        return [f"<{first_line(error)}>"] * len(column)
    if pa.types.is_floating(column.type):
        return [None if value != value else value for value in values]
    if _is_rebuilt(column.type):
        return [_rebuilt(value, column.type) for value in values]
    return values


def _is_rebuilt(type_: Any) -> bool:
    if pa.types.is_map(type_) or pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return True
    return any(_is_rebuilt(type_.field(number).type) for number in range(type_.num_fields))


def _rebuilt(value: Any, type_: Any) -> Any:
    # Spark writes each dict as a map, and pyarrow returns a map as a list of pairs. Some tools write texts as binary.
    if value is None:
        return None
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    if pa.types.is_map(type_):
        return {key: _rebuilt(each, type_.item_type) for key, each in value}
    if pa.types.is_struct(type_):
        inner = {field.name: field.type for field in type_}
        return {name: _rebuilt(each, inner[name]) for name, each in value.items()}
    if isinstance(value, list):
        return [_rebuilt(each, type_.value_type) for each in value]
    return value


# json files: read completely, up to a limit.


# Largest json file, uncompressed. Each process that prepares it holds all of it, and its rows take several times more.
JSON_BYTES = 2**30


def read_whole(stream: Any, file: File) -> bytes:
    """Return the content of a json file; raise UserError if it is too large to be read at once."""
    content: bytes = stream.read(JSON_BYTES + 1)
    if len(content) > JSON_BYTES:
        raise UserError(
            f"{file.uri}: more than {JSON_BYTES >> 20} MiB, the limit of a JSON file;"
            " write it as .jsonl, with one object per line"
        )
    return content


def rows_of(file: File, content: bytes) -> list[Any]:
    """Return the rows of a json file, a list of rows or an object of columns; raise UserError for anything else."""
    try:
        tree = _JSON.decode(content.removeprefix(BOM).decode())
    except json.JSONDecodeError as error:
        # Not FILE:N, which is row N of a json file in all other messages.
        raise UserError(f"{file.uri}, line {error.lineno}: broken JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file.uri}: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{file.uri}: broken JSON: nested too deeply") from None
    except ValueError as error:  # a number with more digits than Python parses
        raise UserError(f"{file.uri}: broken JSON: {first_line(error)}") from None
    except MemoryError:
        raise UserError(
            f"{file.uri}: not enough memory for its {len(content) / 1e6:,.0f} MB of JSON;"
            " write it as .jsonl, with one object per line"
        ) from None
    if isinstance(tree, list):
        return tree
    parts = list(tree.values()) if isinstance(tree, dict) else []
    if parts and all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        # pandas writes rows by their numbers: either the rows inside each column, or the columns inside each row.
        by_number = [all(map(str.isdigit, names)) for names in (tree, parts[0])]
        if by_number == [True, False]:
            return parts
        if by_number == [False, True]:
            parts = [list(part.values()) for part in parts]
    wrapped = (
        len(parts) == 1
        and isinstance(parts[0], list)
        and all(isinstance(row, dict) for row in parts[0])
    )
    if (
        parts
        and not wrapped
        and all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts)
    ):
        return [dict(zip(tree, values, strict=True)) for values in zip(*parts, strict=True)]
    raise UserError(
        f"{file.uri}: expected a list of rows, or an object of columns of equal length; write the list of rows alone,"
        " or as .jsonl, with one object per line"
    )


# Uncompressed copies of large compressed files: one per node, instead of decompressing the file up to each unit.


# Bytes before a unit from which a copy is worth it: tokenising takes several hundred times as long as decompressing.
WORTH_IT = 256 * 2**20


def _copy(file: File) -> Path | None:
    # None means that the disk has no room for a copy.
    def unpack(partial: Path) -> None:
        folder = partial.parent
        node_cache.make_room(folder, folder.glob("*.raw"))
        # Compressed text is three to ten times smaller.
        if shutil.disk_usage(folder).free < 10 * file.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open_stream(file) as stream, partial.open("wb") as copy:
            shutil.copyfileobj(stream, copy, 2**23)

    try:
        folder = storage.private_folder("olora_ray") / "unpacked"
        return node_cache.cached(
            folder / f"{digest(file.uri, file.size, file.modified, length=32)}.raw", unpack
        )
    except OSError:  # a full disk, or no folder; if the file itself is unreadable, reading without a copy says so
        return None


# Rows of a unit, by type of file.


# Rows that are asked for at a time.
BATCH = 256
ESCAPED = '\\"'
# Python and pandas write NaN where there is no value; no text of a row is a number without one.
_JSON = json.JSONDecoder(parse_constant=lambda _: None)
# "surrogateescape" puts a half surrogate in place of each byte that is not UTF-8.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
# Exceptions that a damaged container or compression raises.
UNREADABLE = (pa.ArrowInvalid, OSError, EOFError, lzma.LZMAError)


# Position and row; the row is a `Rejected` if it could not be read.
Located = tuple[int, Any]


def read_unit(
    file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]
) -> Iterator[Located]:
    """Yield the rows of a unit with their positions.

    `header` names the columns of a csv file; of files that have columns only `columns` are read. Raise UserError for
    a broken file, Changed if it is not what the scan saw, and StoreUnavailable.
    """
    rows: Iterator[Located] | None = None
    done = 0

    def more(*_: object) -> list[Located]:
        # If an object store fails in between, the unit is read again, and the rows that were yielded are skipped.
        nonlocal rows
        if rows is None:
            rows = itertools.islice(_read(file, unit, header, columns), done, None)
        try:
            return list(itertools.islice(rows, BATCH))
        except Exception:
            rows = None
            raise

    try:
        while batch := storage.ask(file.uri, more):
            yield from batch
            done += len(batch)
    except FileNotFoundError:
        raise not_here(file) from None
    except UNREADABLE as error:
        raise broken(file, error) from None


def _read(
    file: File, unit: Unit, header: Sequence[str], columns: Sequence[str]
) -> Iterator[Located]:
    match file.kind:
        case "jsonl":
            return _jsonl(file, unit)
        case "text":
            return _text(file, unit)
        case "json":
            return _json(file, unit)
        case "parquet":
            return _parquet(file, unit, columns)
        case "arrow":
            return _arrow(file, unit, columns)
        case _:
            return _csv(file, unit, header)


def not_here(file: File) -> UserError:
    # The driver has listed the file, but this process, perhaps on another node, cannot see it.
    return UserError(
        f"{file.uri}: missing on node {socket.gethostname()}: it was removed after it was listed, or this node cannot"
        " see this path; put the file where all nodes see it"
    )


def broken(file: File, error: Exception) -> UserError | StoreUnavailable:
    if isinstance(error, StoreUnavailable):
        return StoreUnavailable(f"{file.uri}: {error}")
    kind = file.compression or file.kind
    return UserError(f"{file.uri}: not a readable {kind} file: {first_line(error)}")


def open_raw(file: File) -> Any:
    """Open a file as a stream of its bytes on disk."""
    system, path = storage.filesystem(file.uri)
    return system.open_input_stream(path, compression=None)


def open_stream(file: File) -> Any:
    """Open the content as a stream, uncompressed and in UTF-8."""
    return unpacked(open_raw(file), file)


def unpacked(raw: Any, file: File) -> Any:
    """Return the content of a file as a stream, from the stream of its bytes on disk."""
    if file.compression == "xz":
        raw = lzma.LZMAFile(raw)  # noqa: SIM115 - closed by whoever closes the stream
    elif file.compression:
        raw = pa.CompressedInputStream(_native(raw), file.compression)
    if file.encoding:
        raw = pa.transcoding_input_stream(_native(raw), file.encoding, "utf-8")
    return raw


def _native(stream: Any) -> pa.NativeFile:
    if isinstance(stream, pa.NativeFile):
        return stream
    return pa.PythonFile(stream, mode="r")


def _bytes(file: File, unit: Unit) -> bytes:
    content = _range(file, unit)
    if zlib.crc32(content, unit.before) != unit.after:
        raise Changed(file)
    return content


def _range(file: File, unit: Unit) -> bytes:
    if file.compression is None and file.encoding is None:
        system, path = storage.filesystem(file.uri)
        with system.open_input_file(path) as stream:
            stream.seek(unit.offset)
            return bytes(stream.read(unit.size))
    copied = _copy(file) if unit.offset >= WORTH_IT else None
    if copied is not None:
        with contextlib.suppress(FileNotFoundError), copied.open("rb") as copy:
            copy.seek(unit.offset)
            content = copy.read(unit.size)
            if zlib.crc32(content, unit.before) == unit.after:
                return content
            copied.unlink()  # damaged, or a copy of other content
    with open_stream(file) as stream:
        left = unit.offset
        while left > 0 and (skipped := len(stream.read(min(2**23, left)))):
            left -= skipped
        return bytes(stream.read(unit.size))


def _jsonl(file: File, unit: Unit) -> Iterator[Located]:
    for number, line in enumerate(_bytes(file, unit).split(b"\n")):
        if number + unit.first == 0:
            line = line.removeprefix(BOM)
        if line.strip():
            yield unit.first + number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return _JSON.decode(line.decode())
    except json.JSONDecodeError as error:
        return Rejected("broken_json", f"{error.msg} (column {error.colno})")
    except UnicodeDecodeError:
        if line.startswith(b"\x1f\x8b"):
            return Rejected("not_utf8", "the file is compressed: name it .jsonl.gz")
        return Rejected("not_utf8", "not UTF-8 text")
    except RecursionError:
        return Rejected("broken_json", "nested too deeply")
    except ValueError as error:  # a number with more digits than Python parses
        return Rejected("broken_json", first_line(error))


def _csv(file: File, unit: Unit, header: Sequence[str]) -> Iterator[Located]:
    csv.field_size_limit(2**31 - 1)  # no limit here: the scan has one
    text = _bytes(file, unit).decode("utf-8", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[file.kind])
    lines = list(io.StringIO(text, newline="")) if ESCAPED in text else []
    start = 0
    for cells in reader:
        first = start
        start = reader.line_num
        if not cells:
            continue
        row: Any
        if len(cells) != len(header):
            row = Rejected("broken_csv", f"{len(cells)} cells, but the header has {len(header)}")
        elif lines and _has_escaped_quote("".join(lines[first:start]), file):
            row = Rejected(
                "broken_csv",
                f'a quote inside a quoted cell is written as {ESCAPED}, not doubled as ""',
            )
        elif any(map(_NOT_UTF8.search, cells)):
            row = Rejected("not_utf8", "not UTF-8 text")
        else:
            cells = ["" if cell in NULLS else cell for cell in cells]
            row = dict(zip(header, cells, strict=True))
        yield unit.first + first, row


def _has_escaped_quote(record: str, file: File) -> bool:
    # csv.reader accepts a quoted cell that ends before its end. Spark and MySQL write a quote inside a quoted cell with
    # a backslash, where csv doubles it.
    if ESCAPED not in record:
        return False
    text = io.StringIO(record, newline="")
    try:
        list(csv.reader(text, delimiter=DELIMITERS[file.kind], strict=True))
    except csv.Error:
        return True
    return False


def _text(file: File, unit: Unit) -> Iterator[Located]:
    content = _bytes(file, unit)
    if unit.offset == 0:
        content = content.removeprefix(BOM)
    row: Any
    if content.startswith(b"{") and all(
        isinstance(_parsed(line), dict) for line in content.splitlines() if line
    ):
        row = Rejected("bad_text", "its lines are JSON objects: name the file .jsonl")
    else:
        try:
            row = {"text": content.decode()}
        except UnicodeDecodeError:
            row = Rejected("not_utf8", "not UTF-8 text; if it is a table, name it .csv")
    yield unit.first, row


def _json(file: File, unit: Unit) -> Iterator[Located]:
    with open_stream(file) as stream:
        content = read_whole(stream, file)
    if zlib.crc32(content) != unit.after:
        raise Changed(file)
    yield from enumerate(rows_of(file, content)[unit.first : unit.first + unit.rows], unit.first)


def _parquet(file: File, unit: Unit, columns: Sequence[str]) -> Iterator[Located]:
    system, path = storage.filesystem(file.uri)
    with as_scanned(file, unit.after), system.open_input_file(path) as stream:
        metadata, starts = _row_groups(file, unit.after)
        table = parquet.ParquetFile(stream, buffer_size=2**20, metadata=metadata)
        group = bisect_right(starts, unit.first) - 1
        present = _present(table.schema_arrow, columns)
        batches = table.iter_batches(BATCH, row_groups=[group], columns=present)
        yield from _slice(file, batches, starts[group], unit)


@lru_cache(maxsize=4)
def _row_groups(file: File, crc: int) -> tuple[parquet.FileMetaData, list[int]]:
    # Cached, because reading the metadata of 2,000 row groups takes long; `crc` is a key of the cache.
    system, path = storage.filesystem(file.uri)
    with system.open_input_file(path) as stream:
        metadata = parquet.ParquetFile(stream).metadata
    sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return metadata, list(accumulate(sizes, initial=0))[:-1]


def _arrow(file: File, unit: Unit, columns: Sequence[str]) -> Iterator[Located]:
    start = unit.first - unit.before if unit.offset else 0
    with as_scanned(file, unit.after), opened(file, unit) as (schema, batches):
        present = _present(schema, columns)
        yield from _slice(file, (batch.select(present) for batch in batches), start, unit)


def _present(schema: Any, columns: Sequence[str]) -> list[str]:
    # All columns if none of the wanted ones exists, so that the message about it can name them.
    present = [name for name in columns if name in schema.names]
    return present or list(schema.names)


def _slice(file: File, batches: Any, start: int, unit: Unit) -> Iterator[Located]:
    stop = unit.first + unit.rows
    for batch in batches:
        if start >= stop:
            return
        low = max(unit.first - start, 0)
        high = min(stop - start, batch.num_rows)
        if low < high:
            yield from enumerate(rows(batch.slice(low, high - low)), start + low)
        start += batch.num_rows
    if start < stop:
        raise Changed(file)
