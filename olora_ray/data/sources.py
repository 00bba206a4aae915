"""Resolver of configured sources to the files that hold their rows.

A source is a file, a folder, a glob, a folder of `Dataset.save_to_disk`, hf://ORG/NAME, or any of the
first four at s3:// or gs://. All end up as files that every node can read.
"""

import glob
import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.config.schema import Source
from olora_ray.data import hub
from olora_ray.data.formats import check_fields

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = ".jsonl, .json, .csv and .txt (each also with .gz or .zst), .parquet, and folders of Dataset.save_to_disk"


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
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.exists(path) else [path]
    files = [file for name in found for file in _local(name, split, field, alone=len(found) == 1)]
    return _some(files, source.path, field)


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a file and the path in it; keeps the connection, which is slow to make for s3."""
    if not storage.is_uri(uri):
        return fs.LocalFileSystem(), uri
    parts = urlsplit(uri)
    system, root = _connection(parts.scheme, parts.netloc, parts.query)
    return system, root.rstrip("/") + unquote(parts.path)


@lru_cache(maxsize=32)
def _connection(scheme: str, bucket: str, query: str) -> tuple[fs.FileSystem, str]:
    system, root = fs.FileSystem.from_uri(f"{scheme}://{bucket}/" + (f"?{query}" if query else ""))
    return system, str(root)


def _split_of(path: str) -> tuple[str, str]:
    """`folder?split=test` -> folder, test."""
    found = re.fullmatch(r"(.+)\?split=([\w.-]+)", path)
    return (found[1], found[2]) if found and not os.path.exists(path) else (path, "train")


def _local(path: str, split: str, field: str, alone: bool) -> list[File]:
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"{field}: {path}: no such file or folder")
        return [_file(path, os.stat(path), field)]
    if saved := _saved_dataset(fs.LocalFileSystem(), path, split, field):
        return [File(info.path, "arrow", None, info.size, info.mtime_ns) for info in saved]
    names = sorted(
        os.path.join(folder, name)
        for folder, folders, names in os.walk(path)
        if _visible(os.path.relpath(folder, path))
        for name in names
        if _visible(name) and _kind(name)
    )
    if not names and alone:
        raise UserError(f"{field}: folder {path} has no file that can be read; supported: {SUPPORTED}")
    return [_file(name, os.stat(name), field) for name in names]


def _file(path: str, info: os.stat_result, field: str) -> File:
    kind, compression = _known(path, field)
    return File(path, kind, compression, info.st_size, info.st_mtime_ns)


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


def _visible(relative: str) -> bool:
    return not any(part.startswith((".", "_")) and part != "." for part in relative.split(os.sep))


def _saved_dataset(system: Any, folder: str, split: str, field: str) -> list[Any]:
    """The Arrow files of a folder that `datasets` has saved; empty if it is no such folder."""
    if splits := _json_file(system, f"{folder}/dataset_dict.json"):
        if split not in splits["splits"]:
            there = ", ".join(splits["splits"])
            raise UserError(f"{field}: {folder} has no split {split!r}; it has {there} (choose with ?split=...)")
        folder = f"{folder}/{_inside(split, folder, field)}"
    state = _json_file(system, f"{folder}/state.json")
    names = [_inside(entry["filename"], folder, field) for entry in state["_data_files"]] if state else []
    infos = system.get_file_info([f"{folder}/{name}" for name in names])
    for info in infos:
        if not info.is_file:
            raise UserError(f"{field}: {info.path} belongs to the saved data set, but is not there")
    return list(infos)


def _inside(name: str, folder: str, field: str) -> str:
    """The name, if it is that of something in the folder: a data set may come from anybody."""
    if name in (".", "..") or posixpath.basename(name) != name:
        raise UserError(f"{field}: {folder} names {name!r}, which does not lie in it")
    return name


def _json_file(system: Any, path: str) -> Any:
    if not system.get_file_info(path).is_file:
        return None
    with system.open_input_stream(path, compression=None) as stream:
        return json.loads(stream.read())


def _remote(uri: str, field: str) -> list[File]:
    base, _, query = uri.partition("?")
    options = [option for option in query.split("&") if option and not option.startswith("split=")]
    split = next((option[6:] for option in query.split("&") if option.startswith("split=")), "train")
    suffix = "?" + "&".join(options) if options else ""
    wildcard = re.search(r"[*\[]", base)
    fixed = base[: wildcard.start()].rpartition("/")[0] if wildcard else base
    with as_user_error(f"{field}: {uri}", OSError, ValueError):
        system, path = open_filesystem(fixed + suffix)
        info = system.get_file_info(path)
        saved = _saved_dataset(system, path, split, field) if info.type == fs.FileType.Directory else []
        listing = [info] if info.is_file else fs.FileSelector(path, recursive=True, allow_not_found=True)
        found = saved or (listing if info.is_file else system.get_file_info(listing))
    root = fixed.removesuffix(path)
    if saved:
        return [File(f"{root}{info.path}{suffix}", "arrow", None, info.size, info.mtime_ns or 0) for info in saved]
    pattern = _pattern(path + base[len(fixed) :]) if wildcard else None
    files = [_remote_file(item, root, suffix, field) for item in _selected(found, path, pattern, info.is_file)]
    return _some(files, uri, field)


def _selected(found: list[Any], path: str, pattern: re.Pattern[str] | None, single: bool) -> list[Any]:
    files = sorted((item for item in found if item.is_file), key=lambda item: item.path)
    if single:
        return files
    if pattern:
        return [item for item in files if pattern.fullmatch(item.path)]
    return [item for item in files if _visible(item.path[len(path) :].lstrip("/")) and _kind(item.path)]


def _remote_file(info: Any, root: str, suffix: str, field: str) -> File:
    kind, compression = _known(info.path, field)
    return File(f"{root}{info.path}{suffix}", kind, compression, info.size, info.mtime_ns or 0)


def _pattern(wildcards: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/?|\*|\[[^]]+\])", wildcards)
    meaning = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*"}
    return re.compile(
        "".join(meaning.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    )


def _some(files: list[File], path: str, field: str) -> list[File]:
    if not files:
        raise UserError(f"{field}: {path}: no such file or folder, or nothing there that can be read")
    return files


def _stored(uri: str) -> File:
    system, path = open_filesystem(uri)
    info = system.get_file_info(path)
    return File(uri, "parquet", None, info.size, info.mtime_ns or 0)


def total_bytes(files: Sequence[File]) -> int:
    """Bytes of all files as they lie on disk."""
    return sum(file.size for file in files)
