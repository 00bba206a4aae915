"""Files of Arrow's stream form, as `datasets` saves them: where their batches begin, and reading from one of them on.

Only who has read a batch knows where the next one begins. So the scan, which reads all, notes for each unit where the
first of its batches lies; without that, a unit would be read from the start of the file, which in a bucket is a
download of half the file for each of its units.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from olora_ray.data.addresses import open_filesystem
from olora_ray.data.sources import File
from olora_ray.data.units import Unit

LITTLE, MUCH = 2**16, 2**20
"""Bytes that are asked for at a time, at least and at most: what stands around a batch are some bytes, and in a bucket
each read is a request."""


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
    for batch in reader:
        found.rows.append(batch.num_rows)
        offsets.append(position())
        if most is not None and position() >= most:
            break
    # The values of a dictionary stand before the first batch alone.
    if not any(map(_has_dictionary, reader.schema.types)):
        found.offsets = offsets[:-1]
    return found


def _has_dictionary(kind: pa.DataType) -> bool:
    parts = (kind.field(number).type for number in range(kind.num_fields))
    return pa.types.is_dictionary(kind) or any(map(_has_dictionary, parts))


@contextmanager
def opened(file: File, unit: Unit) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema of a file, and its batches from the first of the unit on; from its start where that is not known."""
    system, path = open_filesystem(file.uri)
    with pa.memory_map(path) if system.type_name == "local" else system.open_input_file(path) as stream:
        reader = ipc.open_stream(buffered(stream, LITTLE if unit.offset else MUCH))
        if not unit.offset:
            yield reader.schema, iter(reader)
            return
        stream.seek(unit.offset)
        yield reader.schema, _messages(buffered(stream, max(LITTLE, min(unit.size, MUCH))), reader.schema)


def _messages(stream: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while True:
        try:
            message = ipc.read_message(stream)
        except EOFError:
            return
        yield ipc.read_record_batch(message, schema)


def buffered(stream: Any, at_once: int = MUCH) -> Any:
    """A stream that asks for so much at a time, where each read may be a request."""
    if isinstance(stream, pa.MemoryMappedFile):
        return stream
    native = stream if isinstance(stream, pa.NativeFile) else pa.PythonFile(stream, mode="r")
    return pa.BufferedInputStream(native, at_once)
