"""First look at the data of a run: sources without files or with rows of another format, and detection of formats.

It reads a few rows of a few files, and imports neither torch nor Ray. It refuses a source if none of these rows can
be used; the preparation, which reads all rows, judges everything else.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.load import build, override, parse_yaml
from olora_ray.config.schema import Config, Source
from olora_ray.data import formats, reader
from olora_ray.data.formats import Rejected, to_example
from olora_ray.data.scan import head
from olora_ray.data.sources import File, list_files, say_once

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# A file with the type of its content, a position in it, and the row there.
Looked = tuple[File, int, Any]


def check(config: Config) -> Config:
    """Return the config with the formats that its sources have.

    Raise UserError for a source without files, and if none of its first, middle and last rows can be used. The data
    of a finished run is not read. The preparation checks data sets of the hub whose format is set.
    """
    with contextlib.suppress(OSError):  # the run itself reports a storage that does not answer
        if storage.exists(storage.join(config.folder(), "result.json")):
            return _with(config, _as_trained(config))
    for where, source in _sources(config).items():
        if source.format != "auto" and not source.path.startswith("hf://"):
            _check(source, where, config.run.storage)
    return _with(config, {name: read_as(each, name, config.run.storage) for name, each in _sources(config).items()})


def _sources(config: Config) -> dict[str, Source]:
    splits = {"data.train": config.data.train, "data.eval": config.data.eval}
    return {f"{name}.{number}": source for name, sources in splits.items() for number, source in enumerate(sources)}


def _with(config: Config, known: Mapping[str, Source]) -> Config:
    return override(
        config, {f"{where}.{name}": getattr(known[where], name) for where in known for name in ("format", "fields")}
    )


def _as_trained(config: Config) -> dict[str, Source]:
    # The data of a finished run may be gone, so the formats come from its config.yaml, if it can be read.
    path = storage.join(config.folder(), "config.yaml")
    try:
        trained = _sources(build(parse_yaml(storage.read_text(path), path), path))
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return {name: trained[name] for name, each in _sources(config).items() if each.format == "auto" and name in trained}


def read_as(source: Source, where: str, storage_root: str) -> Source:
    if source.format != "auto":
        return source
    known, words = find_format(source, where, storage_root)
    say_once(f"{where}: {words}", about=source.path)
    return known


def find_format(source: Source, where: str, storage_root: str) -> tuple[Source, str]:
    """Detect format and fields of a source of format auto; return the source with them, and a description.

    Fields that the source sets stay. `where` is the setting that messages name, such as data.train.0; a hub data set
    is written below `storage_root`. Raise UserError for a source without rows, rows that no format can use, and rows
    that can be read in two ways.
    """
    looked = list(_looked(source, where, storage_root))
    try:
        reading = formats.find([row for _, _, row in looked], source.fields, source.chat)
    except UserError as unclear:
        raise UserError(f"{where}: {unclear}") from None
    if reading is None:
        raise _unusable(where, looked, formats.why_not(looked[0][2], source.fields))
    kinds = " and ".join(dict.fromkeys(file.form for file, _, _ in looked))
    fields = "".join(f"; {field}: {column}" for field, column in reading.fields.items())
    known = source.model_copy(update={"format": reading.format, "fields": reading.fields})
    return known, f"{reading.format} rows in {kinds}{fields}"


def _check(source: Source, where: str, storage_root: str) -> None:
    looked, problems = list[Looked](), list[Rejected]()
    for entry in _looked(source, where, storage_root):
        looked.append(entry)
        try:
            # The model is not known yet, so rows that are a chat only with its template pass.
            to_example(source.format, entry[2], source.fields, source.chat is not False)
        except Rejected as why:
            problems.append(why)
        else:
            return
    if problems:
        raise _unusable(where, looked, problems[0], "; remove format and fields to have them detected")


def _unusable(where: str, looked: Sequence[Looked], why: Rejected, hint: str = "") -> UserError:
    file, position, _ = looked[0]
    return UserError(
        f"{where}: none of the {len(looked)} rows read can be used; {file.uri}:{position + 1}:"
        f" {why.reason}: {why.message}{hint}"
    )


def _looked(source: Source, where: str, storage_root: str) -> Iterator[Looked]:
    """Yield ten rows of the first, middle and last unit of the first, middle and last file.

    Raise UserError at the end if there is no row in all of them.
    """
    files = list_files(source, where, storage_root)
    looked_at = _spread(files)
    empty = True
    for named in looked_at:
        # A .json file is read completely, so a large one is read only to detect its format.
        large = named.kind == "json" and named.size > 64 * 2**20
        if large and source.format != "auto":
            empty = False
            continue
        scanned = head(named)
        file = scanned.file or named
        if source.format != "auto" and file.form != named.form:
            logger.info(f"{where}: {file.uri} is read as {file.form}")
        empty = empty and not scanned.units
        for unit in scanned.units[:1] if large else _spread(scanned.units):
            # All columns, so that a message can name them.
            rows = reader.read_unit(file, unit, scanned.columns, scanned.columns)
            yield from ((file, position, row) for position, row in itertools.islice(rows, 10))
    if empty and (source.format == "auto" or len(files) == len(looked_at)):
        problem = (
            "is empty: it has no rows" if len(files) == len(looked_at) else "has no rows in some files; set its format"
        )
        raise UserError(f"{where}.path: {source.path} {problem}")


def _spread(items: Sequence[Item]) -> list[Item]:
    return [items[number] for number in sorted({0, len(items) // 2, len(items) - 1} if items else ())]
