"""First look at the data of a run: sources that lead nowhere or do not fit their format, and formats that are not set.

It reads a few rows of a few files, and imports neither torch nor Ray. A source is refused if not one of the rows
that it looks at can be used; everything else is judged by the preparation, which reads all.
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
from olora_ray.data.sources import File, list_files

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Looked = tuple[File, int, Any]
"""A file as it is written, a place in it, and the row there."""


def check(config: Config) -> Config:
    """Return the config with the formats that its sources have.

    Raises UserError for a source without files, or none of whose first, middle and last rows can be used. A run that
    is finished needs its data no more. Data sets of the hub whose format is set are looked at by the preparation.
    """
    with contextlib.suppress(OSError):  # a storage that does not answer is the run's to report
        if storage.exists(storage.join(config.folder(), "result.json")):
            return _with(config, _as_trained(config))
    for where, source in _sources(config).items():
        if source.format != "auto" and not source.path.startswith("hf://"):
            _check(source, where, config.run.storage)
    return _with(config, {name: read_as(each, name, config.run.storage) for name, each in _sources(config).items()})


def _sources(config: Config) -> dict[str, Source]:
    """The sources of a config by their settings, such as data.train.0."""
    splits = {"data.train": config.data.train, "data.eval": config.data.eval}
    return {f"{name}.{number}": source for name, found in splits.items() for number, source in enumerate(found)}


def _with(config: Config, known: Mapping[str, Source]) -> Config:
    """The config with the formats and fields of these sources."""
    return override(
        config, {f"{where}.{name}": getattr(known[where], name) for where in known for name in ("format", "fields")}
    )


def _as_trained(config: Config) -> dict[str, Source]:
    """The sources of a finished run whose formats this config leaves open; none if its config cannot be read."""
    place = storage.join(config.folder(), "config.yaml")
    try:
        trained = _sources(build(parse_yaml(storage.read_text(place), place), place))
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return {name: trained[name] for name, each in _sources(config).items() if each.format == "auto" and name in trained}


def read_as(source: Source, where: str, storage_root: str) -> Source:
    """Return the source with its format and fields; logs those that it has found."""
    if source.format != "auto":
        return source
    known, words = find_format(source, where, storage_root)
    logger.info(f"{where}: {words}")
    return known


def find_format(source: Source, where: str, storage_root: str) -> tuple[Source, str]:
    """Find the format and the fields of a source of format auto; return it with them, and what is found in words.

    Fields that it sets stay. `where` is the setting that messages name, such as data.train.0; a hub data set is
    written below `storage_root`. Raises UserError for a source without rows, rows that no format can use, and rows that
    can be read in two ways.
    """
    looked = list(_looked(source, where, storage_root))
    try:
        found = formats.find([row for _, _, row in looked], source.fields, source.chat)
    except UserError as unclear:
        raise UserError(f"{where}: {unclear}") from None
    if found is None:
        raise _unusable(where, looked, formats.why_not(looked[0][2], source.fields))
    kinds = " and ".join(dict.fromkeys(file.form for file, _, _ in looked))
    fields = "".join(f"; {field}: {column}" for field, column in found.fields.items())
    known = source.model_copy(update={"format": found.format, "fields": found.fields})
    return known, f"{found.format} rows in {kinds}{fields}"


def _check(source: Source, where: str, storage_root: str) -> None:
    looked, problems = list[Looked](), list[Rejected]()
    for one in _looked(source, where, storage_root):
        looked.append(one)
        try:
            # The model is not looked at yet: rows that are a chat only with its template pass.
            to_example(source.format, one[2], source.fields, source.chat is not False)
        except Rejected as why:
            problems.append(why)
        else:
            return
    if problems:
        raise _unusable(where, looked, problems[0], "; leave out format and fields to have them found")


def _unusable(where: str, looked: Sequence[Looked], why: Rejected, hint: str = "") -> UserError:
    file, place, _ = looked[0]
    return UserError(
        f"{where}: none of the {len(looked)} rows that were looked at can be used; {file.uri}:{place + 1}:"
        f" {why.reason}: {why.message}{hint}"
    )


def _looked(source: Source, where: str, storage_root: str) -> Iterator[Looked]:
    """Ten rows of the first, the middle and the last unit of the first, the middle and the last file.

    Raises UserError at the end if there is no row in all of them.
    """
    files = list_files(source, where, storage_root)
    looked_at = _spread(files)
    empty = True
    for named in looked_at:
        # A .json file is read as a whole: a large one only to find its format.
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
            yield from ((file, place, row) for place, row in itertools.islice(rows, 10))
    if empty and (source.format == "auto" or len(files) == len(looked_at)):
        what = (
            "is empty: it has no rows" if len(files) == len(looked_at) else "has no rows in some files; set its format"
        )
        raise UserError(f"{where}.path: {source.path} {what}")


def _spread(items: Sequence[Item]) -> list[Item]:
    """The first, the middle and the last."""
    return [items[number] for number in sorted({0, len(items) // 2, len(items) - 1} if items else ())]
