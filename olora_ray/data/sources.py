"""Resolver of configured sources to the files that hold their rows.

A source is a file, a folder, a glob, a folder of `Dataset.save_to_disk`, hf://ORG/NAME, or any of the first four at
s3:// or gs://. All of them become files that every node can read.
"""

import contextlib
import glob
import itertools
import json
import logging
import os
import posixpath
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from pyarrow import fs

from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.common.retry import is_temporary
from olora_ray.common.storage import digest
from olora_ray.common.text import did_you_mean, plural
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.config.section import Source
from olora_ray.data.formats import check_fields, field_names
from olora_ray.data.formats.format import NONE

logger = logging.getLogger(__name__)


def uri_beside(uri: str, path: str) -> str:
    """Return the URI of a path in the filesystem of `uri`; raise ValueError for a key that no URI can name."""
    address, mark, query = uri.partition("?")
    bucket = "/".join(address.split("/")[:3])
    key = path.removeprefix(storage.filesystem(f"{bucket}{mark}{query}")[1])
    if uri.startswith("file://"):
        key = key.replace("%", "%25").replace("?", quote("?"))
    elif "?" in key:
        raise ValueError(f"the key {key[1:]!r} has a '?', which begins options in a URI; rename it")
    return f"{bucket}{key}{mark}{query}"


# The matches of a glob are the same on a disk and in the listing of an object store: those of `glob.glob`.


# Log folders of tables: the log says which of a folder's Parquet files hold the current rows of the table.
TABLES = {"_delta_log": "Delta", ".hoodie": "Hudi"}

# A file of a listing, and its path below the listed folder.
Below = tuple[Any, str]


def _matching(path: str) -> list[str]:
    fixed, pattern = _split_pattern(path)
    matches = sorted(glob.glob(path, recursive=True))
    below = [(name, name[len(fixed) :].strip("/")) for name in matches]
    return [
        name
        for name, relative in below
        if not _in_log(relative, pattern)
        and not (_unasked(relative, pattern) and os.path.isdir(name))
    ]


def _table_of(path: str) -> str:
    # Files of a table may lie in folders of partitions, such as day=1.
    table = os.path.dirname(path)
    while "=" in os.path.basename(table):  # of a partition
        table = os.path.dirname(table)
    return table


def _split_pattern(path: str) -> tuple[str, str]:
    wildcard = re.search(r"[*?\[]", path)
    fixed = path[: wildcard.start()].rpartition("/")[0] if wildcard else path
    return fixed, path[len(fixed) :].strip("/")


def _unasked(name: str, pattern: str) -> bool:
    # As in a folder, a name such as `_delta_log` is read only if the glob has it.
    return not _visible(name) and _visible(pattern)


def _in_log(name: str, pattern: str) -> bool:
    return any(f"/{log}/" in f"/{name}/" and log not in pattern.split("/") for log in TABLES)


def _files_matching(
    below: Sequence[Below], pattern: str
) -> tuple[list[Any], dict[str, list[Below]]]:
    """Return the files that match a glob, and for each folder that matches it the files below that folder."""
    parts = pattern.split("/")
    files, folders = list[Any](), dict[str, list[Below]]()
    for item, name in below:
        names = name.split("/")
        if _in_log(name, pattern):
            continue
        if _matches(names, parts):
            files.append(item)
            continue
        end = next((end for end in range(1, len(names)) if _matches(names[:end], parts)), 0)
        if end and not _unasked("/".join(names[:end]), pattern):
            folders.setdefault("/".join(names[:end]), []).append((item, "/".join(names[end:])))
    return files, folders


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """True if the parts of a path match those of a glob, as in `glob.glob`: only a leading dot hides a name."""
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    hidden = names[0].startswith(".") and not parts[0].startswith(".")
    if parts[0] == "**":
        return _matches(names, parts[1:]) or (not hidden and _matches(names[1:], parts))
    return not hidden and fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def _visible(relative: str) -> bool:
    return not any(part.startswith((".", "_")) for part in relative.split("/"))


# hf://ORG/NAME?split=...&name=...&revision=... as Parquet files that every node can read.


ROWS_PER_FILE = 100_000
OPTIONS = {"split", "name", "revision"}


def as_parquet(uri: str, field: str, storage_root: str) -> list[str]:
    """Write a data set of the hub below `storage_root`, unless it is there, and return its files.

    Raise a UserError that starts with `field` if the hub does not deliver it.
    """
    parts = urlsplit(uri)
    query = parts.query.replace(
        "+", "%2B"
    )  # of `split=train+test`: in a form's query it would be a space
    options = {key: values[0] for key, values in parse_qs(query).items()}
    if unknown := sorted(set(options) - OPTIONS):
        raise UserError(
            f"{field}: {uri}: unknown option {unknown[0]!r}; known: {', '.join(sorted(OPTIONS))}"
        )
    name = parts.netloc + parts.path
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        # `datasets` would take a path for a folder of this machine.
        raise UserError(
            f"{field}: {uri}: {name!r} is not the name of a data set of the hub; write hf://ORG/NAME"
        )
    dataset = _load(name, options, uri, field)
    key = digest(uri, dataset._fingerprint, length=32)
    folder = storage.join(storage_root, "tokens", "hub", key)
    listing = storage.join(folder, "files.json")
    if not storage.exists(listing):
        storage.write_text(listing, json.dumps(_write(dataset, folder)))
    return [storage.join(folder, name) for name in json.loads(storage.read_text(listing))]


def _load(name: str, options: dict[str, str], uri: str, field: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    # Exception: the hub, the network and the data set's own files each raise their own exceptions.
    with as_user_error(f"{field}: {uri}", Exception, passes=is_temporary):
        return datasets.load_dataset(
            name,
            options.get("name"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
        )


def _write(dataset: Any, folder: str) -> list[str]:
    pieces = max(1, -(-len(dataset) // ROWS_PER_FILE))
    names = [f"part-{number:05d}.parquet" for number in range(pieces)]
    temporary = tempfile.mkdtemp(prefix="olora-hub-")
    try:
        for number, name in enumerate(names):
            file = Path(temporary, name)
            dataset.shard(pieces, number, contiguous=True).to_parquet(str(file))
            storage.write_bytes(storage.join(folder, name), file.read_bytes())
            file.unlink()
    finally:
        shutil.rmtree(temporary)
    return names


# Folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` of the library `datasets` have written.


SPLITS, STATE = "dataset_dict.json", "state.json"
# A saved folder has one of these files.
SAVED = (SPLITS, STATE)


def _saved_files(system: Any, folder: str, split: str, field: str) -> list[Any]:
    """Return the Arrow files of a folder that `datasets` has saved; empty if it is no such folder."""
    try:
        if (splits := _json_file(system, f"{folder}/{SPLITS}")) is not None:
            names = [str(name) for name in splits["splits"]]
            if split not in names:
                raise UserError(
                    f"{field}: {folder} has no split {split!r}; it has {', '.join(names)} (choose with ?split=...)"
                )
            folder = f"{folder}/{_inside(split, folder, field)}"
        state = _json_file(system, f"{folder}/{STATE}")
        entries = (
            [str(entry["filename"]) for entry in state["_data_files"]] if state is not None else []
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{field}: {folder}: a file of Dataset.save_to_disk is damaged; save it again"
        ) from None
    names = [_inside(name, folder, field) for name in entries]
    infos = system.get_file_info([f"{folder}/{name}" for name in names])
    for info in infos:
        if not info.is_file:
            raise UserError(
                f"{field}: {info.path} belongs to the saved data set, but is missing; save it again"
            )
    return list(infos)


def _inside(name: str, folder: str, field: str) -> str:
    # A data set may come from anybody, so its names must not lead out of its folder.
    if name in (".", "..") or posixpath.basename(name) != name:
        raise UserError(f"{field}: {folder} names {name!r}, which is not in this folder")
    return name


def _json_file(system: Any, path: str) -> Any:
    if not system.get_file_info(path).is_file:
        return None
    with system.open_input_stream(path, compression=None) as stream:
        return json.loads(stream.read())


KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
}
_TRAINING = re.compile(r"[/._ -](train|training)(?=[/._ -]|\d|$)", re.IGNORECASE)
_HELD_OUT = re.compile(
    r"[/._ -](test|testing|validation|valid|val|dev|eval|evaluation)(?=[/._ -]|\d|$)", re.IGNORECASE
)
_HELD_OUT_FIRST = re.compile(_HELD_OUT.pattern.replace("[/._ -]", "/", 1), re.IGNORECASE)
_NOTES = re.compile(r"/(dataset_infos?\.json|(readme|licen[cs]e|notice)(\.\w+)?)$", re.IGNORECASE)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
SUPPORTED = (
    ".jsonl, .json, .csv, .tsv and .txt (each also with .gz, .zst, .bz2 or .xz), .parquet,"
    " and folders of Dataset.save_to_disk"
)


@dataclass(frozen=True)
class File:
    uri: str
    kind: str
    """jsonl, json, parquet, arrow, text (one document) or one of text_files.DELIMITERS; before the scan, from the
    name."""
    compression: str | None = None
    size: int = 0
    """Bytes."""
    modified: int = 0
    """Nanoseconds; 0 if unknown."""
    encoding: str | None = None
    """utf-16 or cp1252 if the content is not UTF-8 (text_files.py)."""

    @property
    def form(self) -> str:
        """Type and encoding, such as `semicolon csv, cp1252`."""
        return self.kind + f", {self.encoding}" * bool(self.encoding)


def list_files(source: Source, where: str, storage_root: str) -> list[File]:
    """Return the files of a source, sorted by name.

    `where` is the setting that messages name, such as data.train.0; a hub data set is written below `storage_root`.
    Raise UserError for a path without files, or with files of an unknown type.
    """
    check_fields(source.format, source.fields, where)
    files = _all_files(source, f"{where}.path", storage_root)
    if not source.only:
        return _of_split(files, source.path, where)
    if missing := sorted(set(source.only) - {file.uri for file in files}):
        raise UserError(f"{where}.only: {missing[0]} is not among the files of {source.path}")
    return [file for file in files if file.uri in source.only]


def grouped(config: AnyConfig, sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources with the answer for the column of `gate.group`, which the gate reads."""
    group = config.gate.group if isinstance(config, Config) else None
    if group is None or group == "@file":
        return tuple(sources)
    answered = []
    for source in sources:
        if group not in (*field_names("auto"), *field_names(source.format)):
            source = source.model_copy(update={"fields": {group: NONE, **source.fields}})
        answered.append(source)
    return tuple(answered)


def _of_split(files: list[File], path: str, where: str) -> list[File]:
    folder = posixpath.commonprefix([file.uri for file in files]).rpartition("/")[0]
    names = {file: file.uri[len(folder) :] for file in files}
    training = [file for file in files if _TRAINING.search(names[file])]
    # If no name marks a training file, such a word inside a name may mean something else.
    held_out = [
        file for file in files if (_HELD_OUT if training else _HELD_OUT_FIRST).search(names[file])
    ]
    others = training if where.startswith("data.eval") else held_out
    for left_out, what in (
        ([file for file in files if _NOTES.search(names[file])], "no rows"),
        (others, "another split by name; to use them here, add a source for them"),
    ):
        out = set(left_out)
        if kept := [file for file in files if file not in out]:
            shown = ", ".join(names[file][1:] for file in left_out[:3]) + ", ..." * (
                len(left_out) > 3
            )
            if left_out:
                say_once(f"{where}.path: ignored in {path}: {shown} ({what})", logging.WARNING)
            files = kept
    return files


def _all_files(source: Source, field: str, storage_root: str) -> list[File]:
    if source.path.startswith("hf://"):
        return [_stored(uri) for uri in as_parquet(source.path, field, storage_root)]
    if storage.is_uri(source.path):
        return _remote(source.path, field)
    path, split = _split_of(source.path)
    paths = _matching(path) if glob.has_magic(path) and not os.path.exists(path) else [path]
    files = [file for name in paths for file in _local(name, split, field, alone=len(paths) == 1)]
    _warn_of_tables([file.uri for file in files], os.path.isdir, field)
    # A glob with ** matches a folder and also the files in it.
    once = {os.path.normpath(file.uri): file for file in files}
    return _some(list(once.values()), source.path, field)


def _split_of(path: str) -> tuple[str, str]:
    # `folder?split=test` -> folder, test.
    match = re.fullmatch(r"(.+)\?split=([\w.-]+)", path)
    return (match[1], match[2]) if match and not os.path.exists(path) else (path, "train")


def _local(path: str, split: str, field: str, alone: bool) -> list[File]:
    if not os.path.isdir(path):
        return [_file(path, field)]
    if saved := _saved_files(fs.LocalFileSystem(), path, split, field):
        return [File(info.path, "arrow", None, info.size, info.mtime_ns) for info in saved]
    names, linked = _below(path, field)
    known = sorted(name for name in names if _kind(name))
    if not known and alone:
        raise UserError(
            f"{field}: folder {path} has no file that can be read; supported: {SUPPORTED}"
        )
    _say_passed_over([name for name in names if not _kind(name)], linked, path, field)
    return [_file(name, field) for name in known]


def _below(path: str, field: str) -> tuple[list[str], int]:
    def unreadable(error: OSError) -> None:
        raise UserError(f"{field}: {error.filename}: {error.strerror}")

    names: list[str] = []
    linked = 0
    for folder, folders, here in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if _visible(name)]
        names += [os.path.join(folder, name) for name in here if _visible(name)]
        linked += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
    return names, linked


def _file(path: str, field: str) -> File:
    if not os.path.lexists(path):
        name = os.path.relpath(path)
        of_hub = re.fullmatch(r"\w[\w-]*/\w[\w-]*", name) and not os.path.isdir(
            os.path.dirname(path)
        )
        hint = (
            f"; if it is a data set of the hub, write hf://{name}" if of_hub else did_you_mean(path)
        )
        raise UserError(f"{field}: {path}: no such file or folder{hint}")
    kind, compression = _known(path, field)
    try:
        path.encode()
    except UnicodeEncodeError:  # pyarrow cannot open it, and a manifest cannot name it
        raise UserError(
            f"{field}: {path!r}: the name is not UTF-8; rename the file or folder"
        ) from None
    if not os.path.isfile(path):  # reading a pipe would block, and works only once
        raise UserError(f"{field}: {path}: neither a file nor a link to one")
    info = os.stat(path)
    return File(path, kind, compression, info.st_size, info.st_mtime_ns)


def _say_passed_over(names: Sequence[str], linked: int, folder: str, field: str) -> None:
    endings = Counter(_ending(name) for name in names)
    parts = [f"{count:,} {ending}" for ending, count in sorted(endings.items())]
    parts += [plural(linked, "linked folder")] if linked else []
    if parts:
        say_once(f"{field}: not read in {folder}: {', '.join(parts)}; supported: {SUPPORTED}")


@lru_cache(maxsize=1024)
def say_once(line: str, level: int = logging.INFO, about: str = "") -> None:
    """Log a line about a path once per process; `about` is the path if the line does not name it."""
    logger.log(level, line)


def _warn_of_tables(paths: Sequence[str], is_folder: Callable[[str], bool], field: str) -> None:
    for table, log in itertools.product(sorted(set(map(_table_of, paths))), TABLES):
        if is_folder(f"{table}/{log}"):
            say_once(
                f"{field}: {table} is a {TABLES[log]} table ({log}), but all its files are read, with changed and"
                " deleted rows; export its current rows to another folder",
                logging.WARNING,
            )


def _ending(name: str) -> str:
    stem, suffix = posixpath.splitext(posixpath.basename(name.lower()))
    if suffix in COMPRESSIONS:
        suffix = posixpath.splitext(stem)[1] + suffix
    return suffix or "without suffix"


def _kind(name: str) -> tuple[str, str | None] | None:
    stem, suffix = posixpath.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    kind = KINDS.get(posixpath.splitext(stem)[1] if compression else suffix)
    return (kind, compression) if kind and not (compression and kind == "parquet") else None


def _known(path: str, field: str) -> tuple[str, str | None]:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{field}: {path}: unknown file type; save it as one of these: {SUPPORTED}")
    return kind


def _remote(uri: str, field: str) -> list[File]:
    base, _, query = uri.partition("?")
    options = [option for option in query.split("&") if option and not option.startswith("split=")]
    if any("=" not in option for option in options):
        raise UserError(
            f"{field}: {uri}: after a '?' come options such as region=...; rename a file with a '?' in its name"
        )
    split = next(
        (option[6:] for option in query.split("&") if option.startswith("split=")), "train"
    )
    suffix = "?" + "&".join(options) if options else ""
    fixed, pattern = _split_pattern(base)

    def of_folder(system: Any, path: str, below: Sequence[Below]) -> list[File]:
        if any(name in SAVED for _, name in below) and (
            saved := _saved_files(system, path, split, field)
        ):
            return [_remote_file(item, fixed + suffix, ("arrow", None)) for item in saved]
        found = _readable(below, base, field)
        return [_remote_file(item, fixed + suffix, _known(item.path, field)) for item in found]

    def look(system: fs.FileSystem, path: str) -> list[File]:
        info = system.get_file_info(path)
        if info.is_file:
            return [_remote_file(info, fixed + suffix, _known(info.path, field))]
        below = _listed(system, path)
        if pattern:
            matching, folders = _files_matching(below, pattern)
            files = [
                _remote_file(item, fixed + suffix, _known(item.path, field)) for item in matching
            ]
            files += [
                file
                for name, inner in folders.items()
                for file in of_folder(system, f"{path}/{name}", inner)
            ]
            files.sort(key=lambda file: file.uri)
        else:
            files = of_folder(system, path, below)
        parents = {posixpath.dirname(item.path) for item, _ in below}
        logs = {
            uri_beside(fixed + suffix, parent).partition("?")[0]
            for parent in parents
            if posixpath.basename(parent) in TABLES
        }
        _warn_of_tables([file.uri.partition("?")[0] for file in files], logs.__contains__, field)
        return files

    with as_user_error(f"{field}: {uri}", OSError, ValueError):
        return _some(storage.ask(fixed + suffix, look), uri, field)


def _listed(system: Any, path: str) -> list[Below]:
    listing = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    files = sorted((item for item in listing if item.is_file), key=lambda item: item.path)
    return [(item, item.path[len(path) :].strip("/")) for item in files]


def _readable(below: Sequence[Below], folder: str, field: str) -> list[Any]:
    files = [item for item, name in below if _visible(name)]
    _say_passed_over([item.path for item in files if not _kind(item.path)], 0, folder, field)
    return [item for item in files if _kind(item.path)]


def _remote_file(info: Any, uri: str, kind: tuple[str, str | None]) -> File:
    return File(uri_beside(uri, info.path), *kind, info.size, info.mtime_ns or 0)


def _some(files: list[File], path: str, field: str) -> list[File]:
    if not files:
        raise UserError(
            f"{field}: {path}: no such file or folder, or it has no file that can be read"
        )
    return files


def _stored(uri: str) -> File:
    def look(system: fs.FileSystem, path: str) -> File:
        info = system.get_file_info(path)
        return File(uri, "parquet", None, info.size, info.mtime_ns or 0)

    return storage.ask(uri, look)


# Checks that a file is still what the scan saw.


CHUNK = 8 * 2**20


class Changed(UserError):
    """The error for a file that is not, or not on this node, what the scan saw."""

    def __init__(self, file: File) -> None:
        super().__init__(
            f"{file.uri}: changed after it was scanned; run the same command again. If the error stays, give all nodes"
            " the same file at this path"
        )
        self.file = file

    def __reduce__(self) -> tuple[type["Changed"], tuple[File]]:
        return Changed, (self.file,)


@contextlib.contextmanager
def steady(file: File) -> Iterator[tuple[int, int]]:
    """Yield size and modification time of a file; raise Changed if they change within the block."""
    state = _state(file)
    yield state
    if _state(file) != state:
        raise Changed(file)


def _state(file: File) -> tuple[int, int]:
    system, path = storage.filesystem(file.uri)
    info = system.get_file_info(path)
    if not info.is_file:
        raise FileNotFoundError(path)
    return info.size, info.mtime_ns or 0


@contextlib.contextmanager
def as_scanned(file: File, crc: int) -> Iterator[None]:
    """Check that a file that is not read by byte ranges is what the scan saw, and stays so; raise Changed."""
    with steady(file) as (size, modified):
        # A copy on another node may have another modification time: then the content decides.
        known = size == file.size and modified and modified == file.modified
        if not known and (size != file.size or _crc(file.uri, size, modified) != crc):
            raise Changed(file)
        yield


@lru_cache(maxsize=4096)
def _crc(uri: str, size: int, modified: int) -> int:
    # `size` and `modified` are keys of the cache: a file that changes is read again.
    system, path = storage.filesystem(uri)
    crc = 0
    with system.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
