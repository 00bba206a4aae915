"""Files and rows of a source, as a run lists and reads them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from olora_ray.config.section import Source
from olora_ray.data import scan, sources
from olora_ray.data.reader import read_unit
from olora_ray.data.sources import File


def listed(path: Path | str, **source: Any) -> list[File]:
    return sources.list_files(Source(path=str(path), format="text", **source), "data.train.0", "")


def names(path: Path | str) -> list[str]:
    return [file.uri.rsplit("/", 1)[1] for file in listed(path)]


def rows(file: File, columns: Sequence[str] = ()) -> list[Any]:
    """Return the rows with these columns, all by default."""
    found = scan.scan(file, "")
    file = found.file or file
    wanted = columns or found.columns
    parts = (read_unit(file, unit, found.columns, wanted) for unit in found.units)
    return [row for part in parts for _, row in part]


def texts(files: Iterable[File]) -> list[str]:
    return [row["text"] for file in files for row in rows(file, ["text"])]
