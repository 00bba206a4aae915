"""Scan of a file in one pass: the digest of its content, and the units by which it can be read from anywhere.

Scanning costs about as much as reading, so the results are kept (kept_scans.py).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.data import arrow_stream, csv_records, json_file, kept_scans, lines, reader
from olora_ray.data.addresses import asked, open_filesystem
from olora_ray.data.sources import File
from olora_ray.data.unchanged import steady
from olora_ray.data.units import FileScan, Unit, Units

UNITS_WANTED = 64
"""Of a file that `datasets` has saved."""
SLOW_UNITS = 8
"""Of a file each of whose units costs a pass over all of it, or over its row group."""
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
    return dataclasses.replace(_scan(file, limit=lines.CHUNK), sha256="")


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
        while self.read(lines.CHUNK):
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
            marks, columns = csv_records.mark_records(stream, file, limit)
        else:
            marks = lines.mark_lines(stream, file, limit)
        seen = hashed.bytes
        if limit is None:
            hashed.finish()
    units = Units.of(lines.documents(marks) if file.kind == "text" else lines.row_units(marks, file))
    rows = units.rows
    if limit is not None:
        rows = round(rows * max(1.0, file.size / max(seen, 1)))
        if file.kind == "jsonl" and file.compression is None and lines.is_cut_row(_open_line(file)):
            raise lines.cut_off(file)
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
        content = json_file.read_whole(stream, file)
        hashed.finish()
    rows, crc = len(json_file.rows_of(file, content)), zlib.crc32(content)
    units = (dataclasses.replace(unit, after=crc) for unit in _slices(0, rows, file.size, SLOW_UNITS))
    return FileScan(hashed.sha256.hexdigest(), rows, (), Units.of(units))


def _slices(first: int, rows: int, size: int, wanted: int) -> Iterator[Unit]:
    """Equal parts of `rows` rows of `size` bytes: about `wanted`, more if they would be large."""
    count = max(min(wanted, rows // lines.UNIT_ROWS), -(-size // lines.SLOW_UNIT_BYTES), 1)
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
        found = arrow_stream.look(hashed, lambda: hashed.bytes, limit)
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
    return _Hashed(arrow_stream.buffered(system.open_input_stream(path, compression=None)), with_crc=True)


def _of_whole(hashed: _Hashed, rows: int, columns: tuple[str, ...], units: Iterable[Unit]) -> FileScan:
    """The scan of a file whose units are checked by the CRC-32 of all that it has."""
    units = (dataclasses.replace(unit, after=hashed.crc) for unit in units)
    return FileScan(hashed.sha256.hexdigest(), rows, columns, Units.of(units))
