"""First look at the data of a run: sources without files or with rows of another format, and detection of formats.

It reads a few rows of a few files, and imports neither torch nor Ray. It refuses a source if none of these rows can
be used; the preparation, which reads all rows, judges everything else.
"""

import contextlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.config.section import Source, is_auto
from olora_ray.data import columns, reader, schemas
from olora_ray.data.formats import format_named, own_formats, to_example
from olora_ray.data.formats.chat import sequence
from olora_ray.data.formats.format import (
    EMPTY,
    FEEDBACK,
    NONE,
    Example,
    Field,
    Format,
    Rejected,
    columns_in,
    listed,
    one_line,
)
from olora_ray.data.formats.markup import is_marked
from olora_ray.data.formats.text import TEXTS
from olora_ray.data.scan import head
from olora_ray.data.sources import File, list_files, say_once

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# A file with the type of its content, a position in it, and the row there.
Sampled = tuple[File, int, Any]


def check_data(config: Config) -> dict[str, Source]:
    """Return the sources of format auto with the format and fields that their rows have, by their settings.

    Raise UserError for a source without files, and if none of its first, middle and last rows can be used. The data
    of a finished run is not read: it may be gone. The preparation checks data sets of the hub whose format is set.
    """
    with contextlib.suppress(OSError):  # the run itself reports a storage that does not answer
        if storage.exists(storage.join(config.folder(), "result.json")):
            return {}
    for where, source in _sources(config).items():
        if not is_auto(source.format) and not source.path.startswith("hf://"):
            check_source(source, where, config.run.storage)
    return find_formats(config)


def find_formats(config: Config) -> dict[str, Source]:
    """Return the sources of format auto as `check_data`; the other ones are not read, except those of the hub."""
    sources = _sources(config)
    read = {name: read_as(each, name, config.run.storage) for name, each in sources.items()}
    return {name: each for name, each in read.items() if is_auto(sources[name].format)}


def with_formats(config: Config, found: Mapping[str, Source]) -> Config:
    """Return the config with the formats that `check_data` has found."""
    values: dict[str, Any] = {}
    for setting, source in found.items():
        values |= {f"{setting}.format": source.format, f"{setting}.fields": source.fields}
    return override(config, values)


def _sources(config: Config) -> dict[str, Source]:
    named = {}
    for setting, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for number, source in enumerate(sources):
            named[f"{setting}.{number}"] = source
    return named


def read_as(source: Source, where: str, storage_root: str) -> Source:
    if not is_auto(source.format):
        if source.path.startswith("hf://"):  # `check` does not download it
            check_source(source, where, storage_root)
        return source
    found = find_format(source, where, storage_root)
    say_once(f"{where}: {found.words}", about=source.path)
    return found.source


@dataclass(frozen=True)
class Found:
    """A source whose format its first rows have decided."""

    source: Source
    """With its format and fields; columns that nothing reads are mapped to none."""
    words: str
    left_out: dict[str, Any]
    """Column that nothing reads -> one of its values."""


def find_format(source: Source, where: str, storage_root: str) -> Found:
    """Detect format and fields of a source of format auto.

    Fields that the source sets stay. `where` is the setting that messages name, such as data.train.0; a hub data set
    is written below `storage_root`. Raise UserError for a source without rows, rows that no format can use, and rows
    whose meaning a person must say.
    """
    looked = list(_looked(source, where, storage_root))
    rows = [row for _, _, row in looked]
    read = [row for row in rows if isinstance(row, Mapping)]
    schema = None
    if all(column == NONE for column in source.fields.values()):
        schema = schemas.matching(read)
    if schema and schema.ask and source.fields.keys().isdisjoint(schema.columns):
        raise columns.which(where, schema.ask, read)
    ways = [source]
    if schema and schema.fields:
        ways.insert(0, source.model_copy(update={"fields": {**schema.fields, **source.fields}}))
    # A reading for another `chat` has a message of its own.
    ways.append(source.model_copy(update={"chat": "auto"}))
    reading = None
    try:
        for way in ways:
            reading = reading or find(rows, way)
    except Rivals as unclear:
        raise columns.which(where, str(unclear), read) from None
    if reading is None:
        why = why_not(rows[0], source)
        if why and not re.search(r"not (text|a list)\b", why.message):
            raise _unusable(where, looked, why)
        file, position, _ = looked[0]
        problem = why.message if why else "no format has these columns"
        raise columns.which(where, f"{file.uri}:{position + 1}: {problem}", read)
    if format_named(reading.format).makes != "pair":
        pairs = columns.of_pairs(where, source, read)
        if pairs:
            raise pairs
    unfit = source.unfit(reading.format)
    if unfit:
        raise UserError(f"{where}.{unfit}")
    known = source.model_copy(update={"format": reading.format, "fields": reading.fields})
    columns.require_clear(where, known, reading.read)
    kinds = " and ".join(dict.fromkeys(file.form for file, _, _ in looked))
    noun = "pairs" if format_named(reading.format).makes == "pair" else "rows"
    words = f"{reading.format} {noun} in {kinds}"
    fields = {**reading.fields, **dict.fromkeys(reading.unread, NONE)}
    for field, column in fields.items():
        if column != NONE:
            words += f"; {field}: {one_line(column, 100)}"
    unused = {field: column for field, column in fields.items() if column == NONE}
    if unused:
        words += f"; left out: {listed(unused)}"
    if _is_marked(read, reading.columns[0]):
        words += MARKED.get(reading.format, "")
    known = known.model_copy(update={"fields": fields})
    return Found(known, words, reading.unread)


MARKED = {
    "text": "; some texts have turns in another tool's markup, but all of their text is trained",
    "messages": "; markup: only the answers are trained, in the model's own chat template; markup: none trains the"
    " texts as they are",
}
"""Format of rows with another tool's markup -> the end of the line about them."""


def _is_marked(rows: Iterable[Mapping[Any, Any]], column: str) -> bool:
    texts = [row.get(column) for row in rows]
    return any(isinstance(text, str) and is_marked(text) for text in texts)


def check_source(source: Source, where: str, storage_root: str) -> None:
    """Look at a source whose format is set; raise UserError if no row can be used, or a column decides."""
    looked = list(_looked(source, where, storage_root))
    rows = [row for _, _, row in looked]
    # The model is not known yet, so rows that are a chat only with its template pass.
    as_chat = source.chat is not False
    read, rejected = _tried(source.format, rows, source.fields, as_chat, source)
    if rejected and not read:
        raise _unusable(
            where, looked, rejected[0], "; remove format and fields to have them detected"
        )
    columns.require_clear(where, source, read)


def _unusable(where: str, looked: Sequence[Sampled], why: Rejected, hint: str = "") -> UserError:
    file, position, _ = looked[0]
    return UserError(
        f"{where}: none of the {len(looked)} rows read can be used; {file.uri}:{position + 1}:"
        f" {why.reason}: {why.message}{hint}"
    )


def _looked(source: Source, where: str, storage_root: str) -> Iterator[Sampled]:
    """Yield ten rows of the first, middle and last unit of the first, middle and last file.

    Raise UserError at the end if there is no row in all of them.
    """
    files = list_files(source, where, storage_root)
    looked_at = _spread(files)
    empty = True
    for named in looked_at:
        # A .json file is read completely, so a large one is read only to detect its format.
        large = named.kind == "json" and named.size > 64 * 2**20
        if large and not is_auto(source.format):
            empty = False
            continue
        scanned = head(named)
        file = scanned.file or named
        if not is_auto(source.format) and file.form != named.form:
            logger.info(f"{where}: {file.uri} is read as {file.form}")
        empty = empty and not scanned.units
        units = _spread(scanned.units)
        if large:
            units = units[:1]
        for unit in units:
            # All columns, so that a message can name them.
            rows = reader.read_unit(file, unit, scanned.columns, scanned.columns)
            yield from ((file, position, row) for position, row in itertools.islice(rows, 10))
    if not empty:
        return
    if len(files) == len(looked_at):
        raise UserError(f"{where}.path: {source.path} is empty: it has no rows")
    if is_auto(source.format):
        raise UserError(f"{where}.path: {source.path} has no rows in some files; set its format")


def _spread(items: Sequence[Item]) -> list[Item]:
    if not items:
        return []
    return [items[number] for number in sorted({0, len(items) // 2, len(items) - 1})]


# Detection of format and fields, if a source sets none: by the names of columns, and by trying to read the rows.


class Rivals(Exception):
    """Two readings of the same rows are equally good."""


@dataclass(frozen=True)
class Interpretation:
    format: str
    fields: dict[str, str]
    """In the form of a source's `fields`."""
    columns: tuple[str, ...]
    """Columns of the fields that the format needs."""
    read: tuple[tuple[Any, Example], ...]
    """The rows that can be used, with their examples."""
    rejected: tuple[Rejected, ...]
    """Why the others cannot be used."""
    rank: tuple[int, ...]
    """Lower is better: certainty of the names, known columns that are ignored, fields to set, order of the formats."""
    unread: dict[str, Any]
    """Column that this reading does not use -> one of its values."""


def find(rows: Sequence[Any], source: Source) -> Interpretation | None:
    """Detect how the rows of a source are meant; return None if no format can use any of them.

    The fields and the choice of `chat` that the source sets stay. Raise Rivals if two readings are equally good.
    """
    candidates = _readings([row for row in rows if isinstance(row, Mapping)], source)
    # Files may have a few rows of another form: a reading for less than half as many rows as the best does not count.
    most = max((len(reading.read) for reading in candidates), default=0)
    readings = [reading for reading in candidates if 2 * len(reading.read) > most]
    if not readings:
        return None
    readings.sort(key=lambda each: each.rank)
    best = readings[0]
    for other in readings:
        if other.rank[:2] == best.rank[:2] and set(other.columns) != set(best.columns):
            ways = [" and ".join(each.columns) for each in (best, other)]
            raise Rivals(f"the rows can be read in two ways, as {ways[0]}, or as {ways[1]}")
    return best


def why_not(row: Any, source: Source) -> Rejected | None:
    """Return why no format reads the row; None if none has its columns."""
    try:
        if not isinstance(row, Mapping):
            to_example("text", row, {})
    except Rejected as why:
        return why
    problems = [why for reading in _readings([row], source) for why in reading.rejected]
    # A class may be called label, too.
    problems = [why for why in problems if why.reason != "no_rating"]
    # Turns with roles that nobody knows are turns. A format that misses a key of the turns is not what is meant.
    return max(
        problems,
        key=lambda why: (why.reason == "bad_role", why.reason != "missing_field"),
        default=None,
    )


def _readings(rows: Sequence[Mapping[Any, Any]], source: Source) -> list[Interpretation]:
    meant = {field for field, column in source.fields.items() if column != NONE}
    readings = []
    for format in own_formats():
        if meant <= set(format.names) and format.takes(source.chat):
            for fields in _assignments(format, rows, source.fields):
                readings.append(_reading(format, fields, rows, source))
    return readings


def _assignments(
    format: Format, rows: Sequence[Mapping[Any, Any]], given: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    """Yield the ways to take the fields of a format from the columns: field -> column."""

    def called(field: Field, found: Iterable[Any]) -> list[str]:
        if field.name in given:
            return [given[field.name]]
        found = [name for name in found if given.get(name) != NONE]
        by_name = {str(column).lower().strip(): str(column) for column in found}
        for names in ((field.name, *field.other_names), field.last_names):
            present = [by_name[name] for name in names if name in by_name]
            if present:
                return present
        return []

    every = list(itertools.chain(*rows))
    ways = [called(field, every) for field in format.fields if field.needed]
    for needed in itertools.product(*ways):
        if len(set(needed)) < len(needed):
            continue
        # By the name of a text, a chat is in a markup.
        by_text = format.has_turns and needed[0].lower().strip() in TEXTS
        if by_text and format.needed[0] not in given and not _is_marked(rows, needed[0]):
            continue
        fields = dict(zip(format.needed, needed, strict=True))
        for field in format.fields:
            if field.in_turn:
                free = called(field, _keys(rows, needed[0]))
            else:
                taken = itertools.chain.from_iterable(map(columns_in, fields.values()))
                free = called(field, set(every).difference(taken))
            if free:
                fields.setdefault(field.name, free[0])
        yield fields


def _keys(rows: Iterable[Mapping[Any, Any]], column: str) -> Iterable[Any]:
    for row in rows:
        with contextlib.suppress(Rejected):
            turns = sequence(row.get(column), column)
            if turns and isinstance(turns[0], Mapping):
                return turns[0]
    return ()


def _reading(
    format: Format,
    fields: dict[str, str],
    rows: Sequence[Mapping[Any, Any]],
    source: Source,
) -> Interpretation:
    """Return the reading with these columns."""
    given = source.fields
    used: set[str] = set()
    for field in format.fields:
        if field.name in fields and not field.in_turn:
            used.update(columns_in(fields[field.name]))
    left: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            column = str(name)
            if value not in EMPTY and column not in used and given.get(column) != NONE:
                left.setdefault(column, value)
    own = {field if field in given else fields[field].lower().strip() for field in format.needed}
    called = {
        field: column
        for field, column in fields.items()
        if field != column or field in format.asked
    }
    called |= given
    read, rejected = _tried(format.name, rows, called, True, source)
    ignored = len(columns.KNOWN.intersection(name.lower().strip() for name in left))
    needed = tuple(fields[field] for field in format.needed)
    rank = (_doubt(format, own), ignored, len(called), own_formats().index(format))
    return Interpretation(format.name, called, needed, read, rejected, rank, left)


def _tried(
    format: str, rows: Iterable[Any], fields: Mapping[str, str], as_chat: bool, source: Source
) -> tuple[tuple[tuple[Any, Example], ...], tuple[Rejected, ...]]:
    """Return the rows that can be read, with their examples, and why the others cannot."""
    read = []
    rejected = []
    for row in rows:
        try:
            read.append((row, to_example(format, row, fields, as_chat, source)))
        except Rejected as why:
            rejected.append(why)
    return tuple(read), tuple(rejected)


def _doubt(format: Format, own: set[str]) -> int:
    """Return how little the names of the needed columns say; lower is better."""
    if format.makes == "ids":
        return 5
    if format.makes in FEEDBACK:
        return -1
    if format.makes == "text":
        return 4
    if own <= TEXTS:  # a chat in a markup
        return 3
    if own == {"messages"}:
        return 0
    if any(own == {*other.needed} for other in own_formats()):
        return 1
    return 2
