"""Resolver of configured sources to the files that hold their rows.

A source is a file, a folder, a glob, a folder of `Dataset.save_to_disk`, hf://ORG/NAME, or any of the first four at
s3:// or gs://. All of them become files that every node can read.
"""

import atexit
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
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pyarrow as pa
from pyarrow import fs, parquet

from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.common.retry import is_temporary
from olora_ray.common.storage import digest
from olora_ray.common.text import did_you_mean, plural
from olora_ray.config.section import Source
from olora_ray.data.formats import check_fields

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


def _split_pattern(path: str) -> tuple[str, str]:
    wildcard = re.search(r"[*?\[]", path)
    fixed = path
    if wildcard:
        fixed = path[: wildcard.start()].rpartition("/")[0]
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
    files = []
    folders: dict[str, list[Below]] = {}
    for item, name in below:
        names = name.split("/")
        if _in_log(name, pattern):
            continue
        if _matches(names, parts):
            files.append(item)
            continue
        for end in range(1, len(names)):
            if _matches(names[:end], parts):
                folder = "/".join(names[:end])
                if not _unasked(folder, pattern):
                    folders.setdefault(folder, []).append((item, "/".join(names[end:])))
                break
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
FIRST_ROWS = 30
SECONDS = 10.0
"""Time that the hub has for the first rows."""


def as_parquet(uri: str, field: str, storage_root: str) -> list[str]:
    """Write a data set of the hub below `storage_root`, unless it is there, and return its files.

    Raise a UserError that starts with `field` if the hub does not deliver it.
    """
    name, options = _hub_name(uri, field)
    import datasets

    datasets.disable_progress_bars()
    # Exception: the hub, the network and the data set's own files each raise their own exceptions.
    with as_user_error(f"{field}: {uri}", Exception, passes=is_temporary):
        dataset = datasets.load_dataset(
            name,
            options.get("name"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
        )
    key = digest(uri, dataset._fingerprint, length=32)
    folder = storage.join(storage_root, "tokens", "hub", key)
    listing = storage.join(folder, "files.json")
    if not storage.exists(listing):
        storage.write_text(listing, json.dumps(_write(dataset, folder)))
    return [storage.join(folder, name) for name in json.loads(storage.read_text(listing))]


def _hub_name(uri: str, field: str) -> tuple[str, dict[str, str]]:
    parts = urlsplit(uri)
    # The + of `split=train+test` would be a space in a form's query.
    query = parts.query.replace("+", "%2B")
    options = {key: values[0] for key, values in parse_qs(query).items()}
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise UserError(
            f"{field}: {uri}: unknown option {unknown[0]!r}; known: {', '.join(sorted(OPTIONS))}"
        )
    name = parts.netloc + parts.path
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        # `datasets` would take a path for a folder of this machine.
        raise UserError(
            f"{field}: {uri}: {name!r} is not the name of a data set of the hub; write hf://ORG/NAME"
        )
    return name, options


def first_rows(uri: str, field: str) -> str | None:
    """Return a Parquet file with the first rows of a data set of the hub, from a byte range of one of its files.

    None for other sources, and after a log line if the hub does not answer in time.
    """
    if not uri.startswith("hf://"):
        return None
    name, options = _hub_name(uri, field)
    folder = tempfile.mkdtemp(prefix="olora-hub-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = f"{folder}/{posixpath.basename(name)}.parquet"
    # A call of the hub's client may try for minutes.
    thread = threading.Thread(target=_begin, args=(name, options, file), daemon=True)
    thread.start()
    thread.join(SECONDS)
    if os.path.exists(file):
        return file
    said = "cannot look at its first rows; the run downloads it first"
    say_once(f"{field}: {uri}: {said}", logging.WARNING)
    return None


def _begin(name: str, options: Mapping[str, str], to: str) -> None:
    """Write a Parquet file with the first rows, unless the hub has none: the run says why."""
    from huggingface_hub import HfFileSystem

    # The hub itself writes most data sets as Parquet, into a branch of their own.
    branches = ["refs%2Fconvert%2Fparquet", "main"]
    if "revision" in options:
        branches = [options["revision"]]
    split = re.split(r"[^\w.-]", options.get("split", "train"))[0]
    words = (options.get("name", ""), split)
    for branch in branches:
        # The hub, the network and pyarrow each raise their own exceptions.
        with contextlib.suppress(Exception):
            system = HfFileSystem()
            paths = sorted(system.glob(f"datasets/{name}@{branch}/**/*.parquet"))
            path = min(paths, key=lambda path: [word not in path for word in words])
            with system.open(path, block_size=2**18) as stream:
                file = parquet.ParquetFile(stream, buffer_size=2**16, pre_buffer=False)
                first = next(file.iter_batches(FIRST_ROWS, row_groups=[0]))
            parquet.write_table(pa.Table.from_batches([first]), to)
            return


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
    entries = []
    try:
        splits = _json_file(system, f"{folder}/{SPLITS}")
        if splits is not None:
            names = [str(name) for name in splits["splits"]]
            if split not in names:
                raise UserError(
                    f"{field}: {folder} has no split {split!r}; it has {', '.join(names)} (choose with ?split=...)"
                )
            folder = f"{folder}/{_inside(split, folder, field)}"
        state = _json_file(system, f"{folder}/{STATE}")
        if state is not None:
            entries += [str(entry["filename"]) for entry in state["_data_files"]]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{field}: {folder}: a file of Dataset.save_to_disk is damaged; save it again"
        ) from None
    paths = [f"{folder}/{_inside(name, folder, field)}" for name in entries]
    infos = system.get_file_info(paths)
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
    ".md": "text",
}
_TRAINING = re.compile(r"[/._ -](train|training)(?=[/._ -]|\d|$)", re.IGNORECASE)
_HELD_OUT = re.compile(
    r"[/._ -](held[_ -]?out|test|testing|validation|valid|val|dev|eval|evaluation)(?=[/._ -]|\d|$)",
    re.IGNORECASE,
)
_HELD_OUT_FIRST = re.compile(_HELD_OUT.pattern.replace("[/._ -]", "/", 1), re.IGNORECASE)
# Markdown beside files of rows tells about them; alone, as in a folder of manuals, it is what is meant.
_NOTES = re.compile(
    r"/(dataset_infos?\.json|.+\.md|(readme|licen[cs]e|notice)(\.\w+)?)$", re.IGNORECASE
)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
SUPPORTED = (
    ".jsonl, .json, .csv, .tsv, .txt and .md (each also with .gz, .zst, .bz2 or .xz), .parquet,"
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
        if self.encoding:
            return f"{self.kind}, {self.encoding}"
        return self.kind


def list_files(source: Source, where: str, storage_root: str) -> list[File]:
    """Return the files of a source, sorted by name.

    `where` is the setting that messages name, such as data.train.0; a hub data set is written below `storage_root`.
    Raise UserError for a path without files, or with files of an unknown type.
    """
    check_fields(source.format, source.fields, where)
    files = _all_files(source, f"{where}.path", storage_root)
    if not source.only:
        return _of_split(files, source.path, where)
    missing = sorted(set(source.only) - {file.uri for file in files})
    if missing:
        raise UserError(f"{where}.only: {missing[0]} is not among the files of {source.path}")
    return [file for file in files if file.uri in source.only]


def _of_split(files: list[File], path: str, where: str) -> list[File]:
    folder = posixpath.commonprefix([file.uri for file in files]).rpartition("/")[0]
    names = {file: file.uri[len(folder) :] for file in files}
    training = [file for file in files if _TRAINING.search(names[file])]
    # If no name marks a training file, such a word inside a name may mean something else.
    marks = _HELD_OUT if training else _HELD_OUT_FIRST
    others = [file for file in files if marks.search(names[file])]
    if where.startswith("data.eval"):
        others = training
    for left_out, what in (
        ([file for file in files if _NOTES.search(names[file])], "no rows"),
        (others, "another split by name"),
    ):
        out = set(left_out)
        kept = [file for file in files if file not in out]
        if not left_out or not kept:
            continue
        shown = [names[file][1:] for file in left_out[:3]]
        if len(left_out) > 3:
            shown.append("...")
        say_once(f"{where}.path: ignored in {path}: {', '.join(shown)} ({what})")
        files = kept
    return files


def _all_files(source: Source, field: str, storage_root: str) -> list[File]:
    if source.path.startswith("hf://"):
        files = []
        for uri in as_parquet(source.path, field, storage_root):
            info = storage.info(uri)
            files.append(File(uri, "parquet", None, info.size, info.mtime_ns or 0))
        return files
    if storage.is_uri(source.path):
        return _remote(source.path, field)
    path = source.path
    split = "train"
    options = re.fullmatch(r"(.+)\?split=([\w.-]+)", path)  # folder?split=test
    if options and not os.path.exists(path):
        path = options[1]
        split = options[2]
    paths = [path]
    if glob.has_magic(path) and not os.path.exists(path):
        fixed, pattern = _split_pattern(path)
        paths = []
        for name in sorted(glob.glob(path, recursive=True)):
            relative = name[len(fixed) :].strip("/")
            asked = not _unasked(relative, pattern) or not os.path.isdir(name)
            if asked and not _in_log(relative, pattern):
                paths.append(name)
    # A glob with ** matches a folder and also the files in it.
    once = {}
    for name in paths:
        for file in _local(name, split, field, alone=len(paths) == 1):
            once[os.path.normpath(file.uri)] = file
    files = list(once.values())
    _warn_of_tables([file.uri for file in files], os.path.isdir, field)
    return _some(files, source.path, field)


def _local(path: str, split: str, field: str, alone: bool) -> list[File]:
    if not os.path.isdir(path):
        return [_file(path, field)]
    saved = _saved_files(fs.LocalFileSystem(), path, split, field)
    if saved:
        return [File(info.path, "arrow", None, info.size, info.mtime_ns) for info in saved]

    def unreadable(error: OSError) -> None:
        raise UserError(f"{field}: {error.filename}: {error.strerror}")

    names = []
    linked = 0
    for folder, folders, here in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if _visible(name)]
        names += [os.path.join(folder, name) for name in here if _visible(name)]
        linked += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
    known = sorted(name for name in names if _kind(name))
    if not known and alone:
        raise UserError(
            f"{field}: folder {path} has no file that can be read; supported: {SUPPORTED}"
        )
    _say_passed_over([name for name in names if not _kind(name)], linked, path, field)
    return [_file(name, field) for name in known]


def _file(path: str, field: str) -> File:
    if not os.path.lexists(path):
        name = os.path.relpath(path)
        hint = did_you_mean(path)
        if re.fullmatch(r"\w[\w-]*/\w[\w-]*", name) and not os.path.isdir(os.path.dirname(path)):
            hint = f"; if it is a data set of the hub, write hf://{name}"
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
    endings = Counter[str]()
    for name in names:
        stem, suffix = posixpath.splitext(posixpath.basename(name.lower()))
        if suffix in COMPRESSIONS:
            suffix = posixpath.splitext(stem)[1] + suffix
        endings[suffix or "without suffix"] += 1
    parts = [f"{count:,} {ending}" for ending, count in sorted(endings.items())]
    if linked:
        parts.append(plural(linked, "linked folder"))
    if parts:
        say_once(f"{field}: not read in {folder}: {', '.join(parts)}; supported: {SUPPORTED}")


@lru_cache(maxsize=1024)
def say_once(line: str, level: int = logging.INFO, about: str = "") -> None:
    """Log a line about a path once per process; `about` is the path if the line does not name it."""
    logger.log(level, line)


def _warn_of_tables(paths: Sequence[str], is_folder: Callable[[str], bool], field: str) -> None:
    tables = set()
    for path in paths:
        table = os.path.dirname(path)
        # Files of a table may lie in folders of partitions, such as day=1.
        while "=" in os.path.basename(table):
            table = os.path.dirname(table)
        tables.add(table)
    for table, log in itertools.product(sorted(tables), TABLES):
        if is_folder(f"{table}/{log}"):
            say_once(
                f"{field}: {table} is a {TABLES[log]} table ({log}), but all its files are read, with changed and"
                " deleted rows; export its current rows to another folder",
                logging.WARNING,
            )


def _kind(name: str) -> tuple[str, str | None] | None:
    stem, suffix = posixpath.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = posixpath.splitext(stem)[1]
    kind = KINDS.get(suffix)
    if kind is None or (compression and kind == "parquet"):
        return None
    return kind, compression


def _known(path: str, field: str) -> tuple[str, str | None]:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{field}: {path}: unknown file type; save it as one of these: {SUPPORTED}")
    return kind


def _remote(uri: str, field: str) -> list[File]:
    base, _, query = uri.partition("?")
    split = "train"
    options = []
    for option in filter(None, query.split("&")):
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(
                f"{field}: {uri}: after a '?' come options such as region=...; rename a file with a '?' in its name"
            )
        if name == "split":
            split = value
        else:
            options.append(option)
    fixed, pattern = _split_pattern(base)
    address = fixed
    if options:
        address += f"?{'&'.join(options)}"

    def as_file(info: Any) -> File:
        return _remote_file(info, address, _known(info.path, field))

    def of_folder(system: Any, path: str, below: Sequence[Below]) -> list[File]:
        if any(name in SAVED for _, name in below):
            saved = _saved_files(system, path, split, field)
            if saved:
                return [_remote_file(info, address, ("arrow", None)) for info in saved]
        visible = [info for info, name in below if _visible(name)]
        _say_passed_over([info.path for info in visible if not _kind(info.path)], 0, base, field)
        return [as_file(info) for info in visible if _kind(info.path)]

    def look(system: fs.FileSystem, path: str) -> list[File]:
        info = system.get_file_info(path)
        if info.is_file:
            return [as_file(info)]
        listing = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        below = [(info, info.path[len(path) :].strip("/")) for info in listing if info.is_file]
        below.sort(key=lambda item: item[0].path)
        if pattern:
            matching, folders = _files_matching(below, pattern)
            files = [as_file(info) for info in matching]
            for name, inner in folders.items():
                files += of_folder(system, f"{path}/{name}", inner)
            files.sort(key=lambda file: file.uri)
        else:
            files = of_folder(system, path, below)
        parents = {posixpath.dirname(info.path) for info, _ in below}
        logs = {
            uri_beside(address, parent).partition("?")[0]
            for parent in parents
            if posixpath.basename(parent) in TABLES
        }
        _warn_of_tables([file.uri.partition("?")[0] for file in files], logs.__contains__, field)
        return files

    with as_user_error(f"{field}: {uri}", OSError, ValueError):
        return _some(storage.ask(address, look), uri, field)


def _remote_file(info: Any, uri: str, kind: tuple[str, str | None]) -> File:
    return File(uri_beside(uri, info.path), *kind, info.size, info.mtime_ns or 0)


def _some(files: list[File], path: str, field: str) -> list[File]:
    if not files:
        raise UserError(
            f"{field}: {path}: no such file or folder, or it has no file that can be read"
        )
    return files


# Checks that a file is still what the scan saw.


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
        while chunk := stream.read(storage.CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
