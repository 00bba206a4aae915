"""Resolver of configured sources to the files that hold their rows.

A source is a file, a folder, a glob, a folder of `Dataset.save_to_disk`, hf://ORG/NAME, or any of the
first four at s3:// or gs://. All end up as files that every node can read.
"""

import glob
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pyarrow import fs

from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.common.text import plural
from olora_ray.config.schema import Source
from olora_ray.data import globs, hub
from olora_ray.data.addresses import asked, open_filesystem, uri_beside
from olora_ray.data.formats import check_fields
from olora_ray.data.saved_dataset import SAVED, saved_files

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
SUPPORTED = (
    ".jsonl, .json, .csv, .tsv and .txt (each also with .gz, .zst, .bz2 or .xz), .parquet,"
    " and folders of Dataset.save_to_disk"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """One file of rows."""

    uri: str
    kind: str
    """jsonl, json, parquet, csv, text (one document) or arrow."""
    compression: str | None = None
    size: int = 0
    """Bytes."""
    modified: int = 0
    """Nanoseconds; 0 if unknown."""


def list_files(source: Source, where: str, storage_root: str) -> list[File]:
    """The files of a source, sorted by name.

    `where` is the setting that messages name, such as data.train.0; a hub data set is written below
    `storage_root`. Raises UserError for a path without files or with files of an unknown kind.
    """
    check_fields(source.format, source.fields, where)
    found = _all_files(source, f"{where}.path", storage_root)
    if not source.only:
        return found
    if missing := sorted(set(source.only) - {file.uri for file in found}):
        raise UserError(f"{where}.only: {missing[0]} is not among the files of {source.path}")
    return [file for file in found if file.uri in source.only]


def _all_files(source: Source, field: str, storage_root: str) -> list[File]:
    if source.path.startswith("hf://"):
        return [_stored(uri) for uri in hub.as_parquet(source.path, field, storage_root)]
    if storage.is_uri(source.path):
        return _remote(source.path, field)
    path, split = _split_of(source.path)
    found = globs.local(path) if glob.has_magic(path) and not os.path.exists(path) else [path]
    for table in sorted(set(map(globs.table_of, found))):
        _warn_of_table([name for name in globs.TABLES if os.path.isdir(os.path.join(table, name))], table, field)
    files = [file for name in found for file in _local(name, split, field, alone=len(found) == 1)]
    # A glob with ** matches a folder and also what lies in it.
    once = {os.path.normpath(file.uri): file for file in files}
    return _some(list(once.values()), source.path, field)


def _split_of(path: str) -> tuple[str, str]:
    """`folder?split=test` -> folder, test."""
    found = re.fullmatch(r"(.+)\?split=([\w.-]+)", path)
    return (found[1], found[2]) if found and not os.path.exists(path) else (path, "train")


def _local(path: str, split: str, field: str, alone: bool) -> list[File]:
    if not os.path.isdir(path):
        return [_file(path, field)]
    if saved := saved_files(fs.LocalFileSystem(), path, split, field):
        return [File(info.path, "arrow", None, info.size, info.mtime_ns) for info in saved]
    _warn_of_table([name for name in globs.TABLES if os.path.isdir(os.path.join(path, name))], path, field)
    names, linked = _below(path, field)
    known = sorted(name for name in names if _kind(name))
    if not known and alone:
        raise UserError(f"{field}: folder {path} has no file that can be read; supported: {SUPPORTED}")
    _say_passed_over([name for name in names if not _kind(name)], linked, path, field)
    return [_file(name, field) for name in known]


def _below(path: str, field: str) -> tuple[list[str], int]:
    """All visible files below a local folder, and the number of linked folders, which are not entered."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{field}: {error.filename}: {error.strerror}")

    names: list[str] = []
    linked = 0
    for folder, folders, here in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if globs.visible(name)]
        names += [os.path.join(folder, name) for name in here if globs.visible(name)]
        linked += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
    return names, linked


def _file(path: str, field: str) -> File:
    if not os.path.lexists(path):
        raise UserError(f"{field}: {path}: no such file or folder")
    kind, compression = _known(path, field)
    try:
        path.encode()
    except UnicodeEncodeError:  # pyarrow opens none, and no manifest can name it
        raise UserError(f"{field}: {path!r}: a name that is not UTF-8; rename the file or folder") from None
    if not os.path.isfile(path):  # a pipe would be waited for, and can be read only once
        raise UserError(f"{field}: {path}: neither a file nor a link to one")
    info = os.stat(path)
    return File(path, kind, compression, info.st_size, info.st_mtime_ns)


def _say_passed_over(names: Sequence[str], linked: int, place: str, field: str) -> None:
    """Say which files of a folder are not read, once in a process: the files are listed several times."""
    endings = Counter(_ending(name) for name in names)
    parts = [f"{count:,} {ending}" for ending, count in sorted(endings.items())]
    parts += [plural(linked, "linked folder")] if linked else []
    if parts:
        _say_once(f"{field}: not read in {place}: {', '.join(parts)}; supported: {SUPPORTED}")


@lru_cache(maxsize=1024)
def _say_once(line: str, level: int = logging.INFO) -> None:
    logger.log(level, line)


def _warn_of_table(logs: Sequence[str], place: str, field: str) -> None:
    for log in logs:
        _say_once(
            f"{field}: {place} is a table of {globs.TABLES[log]} ({log}), and is read as the files that lie there: also"
            " those of rows that were changed or deleted; write the rows as they are now to a folder of their own",
            logging.WARNING,
        )


def _ending(name: str) -> str:
    """What stands for the kind of a file in a message: .tar, .parquet.gz, or that there is nothing."""
    stem, suffix = posixpath.splitext(posixpath.basename(name.lower()))
    if suffix in COMPRESSIONS:
        suffix = posixpath.splitext(stem)[1] + suffix
    return suffix or "without an ending"


def _kind(name: str) -> tuple[str, str | None] | None:
    stem, suffix = posixpath.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    kind = KINDS.get(posixpath.splitext(stem)[1] if compression else suffix)
    return (kind, compression) if kind and not (compression and kind == "parquet") else None


def _known(path: str, field: str) -> tuple[str, str | None]:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{field}: {path}: unknown kind of file; supported: {SUPPORTED}")
    return kind


def _remote(uri: str, field: str) -> list[File]:
    base, _, query = uri.partition("?")
    options = [option for option in query.split("&") if option and not option.startswith("split=")]
    if any("=" not in option for option in options):
        raise UserError(
            f"{field}: {uri}: options such as region=... follow a '?'; no file with a '?' in its name is read"
        )
    split = next((option[6:] for option in query.split("&") if option.startswith("split=")), "train")
    suffix = "?" + "&".join(options) if options else ""
    fixed, pattern = globs.split(base)

    def of_folder(system: Any, path: str, below: Sequence[globs.Below]) -> list[File]:
        if any(name in SAVED for _, name in below) and (saved := saved_files(system, path, split, field)):
            return [_remote_file(item, fixed + suffix, ("arrow", None)) for item in saved]
        _warn_of_table(sorted({name.split("/")[0] for _, name in below} & set(globs.TABLES)), base, field)
        found = _readable(below, base, field)
        return [_remote_file(item, fixed + suffix, _known(item.path, field)) for item in found]

    def look() -> list[File]:
        system, path = open_filesystem(fixed + suffix)
        info = system.get_file_info(path)
        if info.is_file:
            return [_remote_file(info, fixed + suffix, _known(info.path, field))]
        if not pattern:
            return of_folder(system, path, _listed(system, path))
        below = _listed(system, path)
        matching, folders = globs.matching(below, pattern)
        for table, logs in globs.tables_among(below, matching, path).items():
            _warn_of_table(logs, f"{fixed}/{table}".rstrip("/"), field)
        files = [_remote_file(item, fixed + suffix, _known(item.path, field)) for item in matching]
        files += [file for name, below in folders.items() for file in of_folder(system, f"{path}/{name}", below)]
        return sorted(files, key=lambda file: file.uri)

    with as_user_error(f"{field}: {uri}", OSError, ValueError):
        return _some(asked(uri, look), uri, field)


def _listed(system: Any, path: str) -> list[globs.Below]:
    """All files below a path."""
    listing = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    files = sorted((item for item in listing if item.is_file), key=lambda item: item.path)
    return [(item, item.path[len(path) :].strip("/")) for item in files]


def _readable(below: Sequence[globs.Below], place: str, field: str) -> list[Any]:
    """The visible files of a folder whose kind is known; says which are passed over."""
    files = [item for item, name in below if globs.visible(name)]
    _say_passed_over([item.path for item in files if not _kind(item.path)], 0, place, field)
    return [item for item in files if _kind(item.path)]


def _remote_file(info: Any, uri: str, kind: tuple[str, str | None]) -> File:
    """The file of an entry in a listing of `uri`."""
    return File(uri_beside(uri, info.path), *kind, info.size, info.mtime_ns or 0)


def _some(files: list[File], path: str, field: str) -> list[File]:
    if not files:
        raise UserError(f"{field}: {path}: no such file or folder, or nothing there that can be read")
    return files


def _stored(uri: str) -> File:
    def look() -> File:
        system, path = open_filesystem(uri)
        info = system.get_file_info(path)
        return File(uri, "parquet", None, info.size, info.mtime_ns or 0)

    return asked(uri, look)


def total_bytes(files: Sequence[File]) -> int:
    """Bytes of all files as they lie on disk."""
    return sum(file.size for file in files)
