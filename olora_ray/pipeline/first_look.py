"""First look at the data of a run: sources that lead nowhere or do not fit their format, before anything heavy.

It reads a few rows of a few files, and imports neither torch nor Ray. A source is refused if not one of the rows
that it looks at can be used; everything else is judged by the preparation, which reads all.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config, Source
from olora_ray.data import formats, reader
from olora_ray.data.formats import Rejected, columns_of, to_example
from olora_ray.data.reader import FileScan
from olora_ray.data.scan import head
from olora_ray.data.sources import File, list_files

Item = TypeVar("Item")


def check(config: Config) -> None:
    """Raise UserError for a source without files, or none of whose first, middle and last rows can be used.

    A run that is finished needs its data no more. Data sets of the hub are looked at by the preparation.
    """
    with contextlib.suppress(OSError):  # a storage that does not answer is the run's to report
        if storage.exists(storage.join(config.folder(), "result.json")):
            return
    for setting, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for number, source in enumerate(sources):
            if not source.path.startswith("hf://"):
                _check(source, f"{setting}.{number}", config.run.storage)


def _check(source: Source, where: str, storage_root: str) -> None:
    files = list_files(source, where, storage_root)
    looked_at = _spread(files)
    problem, seen, empty = "", 0, len(files) <= len(looked_at)
    for file in looked_at:
        # A .json file is read as a whole: not if it is large.
        scanned = None if file.kind == "json" and file.size > 64 * 2**20 else head(file)
        empty = empty and scanned is not None and not scanned.units
        for place, row in _rows(source, file, scanned):
            seen += 1
            try:
                if isinstance(row, Rejected):
                    raise row
                # The model is not looked at yet: rows that are a chat only with its template pass.
                to_example(source.format, row, source.fields, source.chat is not False)
            except Rejected as why:
                hint = "" if problem else _hint(source, where, row)
                problem = problem or f"{file.uri}:{place + 1}: {why.reason}: {why.message}{hint}"
            else:
                return
    if empty:
        raise UserError(f"{where}.path: {source.path} is empty: it has no rows")
    if problem:
        raise UserError(f"{where}: none of the {seen} rows that were looked at can be used; {problem}")


def _rows(source: Source, file: File, scanned: FileScan | None) -> Iterator[reader.Located]:
    """Ten rows of the first, the middle and the last unit of a file."""
    if scanned is not None:
        # All columns, so that a message can name them.
        columns = scanned.columns or tuple(columns_of(source.format, source.fields))
        for unit in _spread(scanned.units):
            written = scanned.file or file
            yield from itertools.islice(reader.read_unit(written, unit, scanned.columns, columns), 10)


def _hint(source: Source, where: str, row: Any) -> str:
    """Return the end of a message: what to set instead."""
    words = formats.columns(source.format, row)
    return f"; in {where} set {words}" if words else ""


def _spread(items: Sequence[Item]) -> list[Item]:
    """The first, the middle and the last."""
    return [items[number] for number in sorted({0, len(items) // 2, len(items) - 1} if items else ())]
