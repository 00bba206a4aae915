"""First look at the data of a run: sources without files or with rows of another format, and detection of formats.

It reads a few rows of a few files, and imports neither torch nor Ray. It refuses a source if none of these rows can
be used; the preparation, which reads all rows, judges everything else.
"""

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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
    NONE,
    Example,
    Field,
    Format,
    Rejected,
    columns_in,
    listed,
    one_line,
)
from olora_ray.data.formats.markup import chats_in
from olora_ray.data.scan import head
from olora_ray.data.sources import File, grouped, list_files, say_once

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# A file with the type of its content, a position in it, and the row there.
Sampled = tuple[File, int, Any]
NUMBERS = 10
"""Added to the doubt of a reading in which a number is a text: any reading of texts alone is better."""
TEXTS_OR_TURNS = tuple(
    name
    for format in ("text", "messages")
    for name in (format, *format_named(format).fields[0].other_names)
)
"""Names of columns that may hold a chat in a markup."""


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
        values[f"{setting}.markup"] = source.markup
    return override(config, values)


def _sources(config: Config) -> dict[str, Source]:
    named = {}
    for setting, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for number, source in enumerate(grouped(config, sources)):
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
    given = source.fields
    if all(column == NONE for column in given.values()):
        schema = schemas.matching(read)
        if schema and schema.ask:
            raise columns.which(where, schema.ask, read)
        if schema and schema.fields:
            given = {**schema.fields, **given}
    try:
        reading = find(rows, given, source.chat, source)
    except Rivals as unclear:
        raise columns.which(where, str(unclear), read) from None
    source, reading, said = _in_markup(rows, source, reading)
    if reading is None:
        other = find(rows, given, source=source)
        if other is not None:
            raise UserError(f"{where}.{source.wrong_chat(other.format)}")
        pairs = columns.of_pairs(where, read)
        if pairs:
            raise pairs
        why = why_not(looked[0][2], given, source)
        if why and not re.search(r"not (text|a list)\b", why.message):
            raise _unusable(where, looked, why, source)
        file, position, _ = looked[0]
        problem = why.message if why else "no format has these columns"
        raise columns.which(where, f"{file.uri}:{position + 1}: {problem}", read)
    unfit = source.unfit(reading.format)
    if unfit and said:
        unfit += f"; {said}"
    if unfit:
        raise UserError(f"{where}.{unfit}")
    known = source.model_copy(update={"format": reading.format, "fields": reading.fields})
    _require_clear(where, known, zip(read, reading.examples, strict=True))
    left: dict[str, Any] = {}
    for row in read:
        for name, value in row.items():
            if str(name) in reading.unread and value not in EMPTY:
                left.setdefault(str(name), value)
    kinds = " and ".join(dict.fromkeys(file.form for file, _, _ in looked))
    words = f"{reading.format} rows in {kinds}"
    fields = {**reading.fields, **dict.fromkeys(left, NONE)}
    for field, column in fields.items():
        if column != NONE:
            words += f"; {field}: {one_line(column, 100)}"
    unused = {field: column for field, column in fields.items() if column == NONE}
    if unused:
        words += f"; left out: {listed(unused)}"
    if said:
        words += f"; {said}"
    known = known.model_copy(update={"fields": fields})
    return Found(known, words, left)


def _in_markup(
    rows: Sequence[Any], source: Source, reading: "Interpretation | None"
) -> "tuple[Source, Interpretation | None, str]":
    """Return source and reading as chats if texts are whole chats in a markup, and what to say about markups."""
    if reading is None:
        names = {*itertools.chain(*(row for row in rows if isinstance(row, Mapping)))}
        columns = [name for name in TEXTS_OR_TURNS if name in names]
    elif reading.format == "text":
        columns = [reading.fields.get("text", "text")]
    else:
        return source, reading, ""
    chats, said = chats_in(rows, source, columns)
    if chats is not source:
        read = find(rows, chats.fields, chats.chat, chats)
        if read is not None:
            return chats, read, said
    return source, reading, said


def _require_clear(where: str, source: Source, read: Iterable[tuple[Any, Example | None]]) -> None:
    used = [(row, example) for row, example in read if example]
    error = columns.unclear(where, source, used)
    if error:
        raise error


def check_source(source: Source, where: str, storage_root: str) -> None:
    """Look at a source whose format is set; raise UserError if no row can be used, or a column decides."""
    looked = []
    read = []
    problems = []
    # The model is not known yet, so rows that are a chat only with its template pass.
    as_chat = source.chat is not False
    for entry in _looked(source, where, storage_root):
        looked.append(entry)
        row = entry[2]
        try:
            read.append((row, to_example(source.format, row, source.fields, as_chat, source)))
        except Rejected as why:
            problems.append(why)
    if problems and not read:
        raise _unusable(
            where, looked, problems[0], source, "; remove format and fields to have them detected"
        )
    _require_clear(where, source, read)


def _unusable(
    where: str, looked: Sequence[Sampled], why: Rejected, source: Source, hint: str = ""
) -> UserError:
    file, position, _ = looked[0]
    if why.roles:
        roles = {**source.roles, **dict.fromkeys(why.roles, "ROLE")}
        hint = f"; set {columns.setting(f'{where}.roles', roles)}, with user or assistant as ROLE"
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
    examples: tuple[Example | None, ...]
    """One per row; None if the row cannot be used."""
    rank: tuple[int, ...]
    """Lower is better: certainty of the names, known columns that are ignored, fields to set, order of the formats."""
    unread: dict[str, str]
    """Columns with values that this reading does not use, and their names in lower case."""

    @property
    def used(self) -> int:
        return len(self.examples) - self.examples.count(None)


def find(
    rows: Sequence[Any],
    given: Mapping[str, str],
    chat: Literal["auto"] | bool = "auto",
    source: Source | None = None,
) -> Interpretation | None:
    """Detect how rows are meant; return None if no format can use any of them.

    `given` are the fields, and `chat` the choice, that their source sets; `source` has its roles and labels. Raise
    Rivals if two readings are equally good.
    """
    rows = [row for row in rows if isinstance(row, Mapping)]
    meant = {field for field, column in given.items() if column != NONE}
    candidates = []
    for format in own_formats():
        if meant <= set(format.names) and format.takes(chat):
            for fields in _assignments(format, rows, given):
                candidates += _reading(format, fields, rows, given, source)
    # Files may have a few rows of another form: a reading for less than half as many rows as the best does not count.
    most = max((reading.used for reading in candidates), default=0)
    readings = [reading for reading in candidates if 2 * reading.used > most]
    if not readings:
        return None
    readings.sort(key=lambda each: each.rank)
    best = readings[0]
    for other in readings:
        if other.rank[:2] == best.rank[:2] and set(other.columns) != set(best.columns):
            ways = [" and ".join(each.columns) for each in (best, other)]
            raise Rivals(f"the rows can be read in two ways, as {ways[0]}, or as {ways[1]}")
    return best


def why_not(row: Any, given: Mapping[str, str], source: Source | None = None) -> Rejected | None:
    """Return why no format reads the row; None if none has its columns."""
    problems = []
    try:
        if not isinstance(row, Mapping):
            to_example("text", row, {})
    except Rejected as why:
        return why
    for format in own_formats():
        for fields in _assignments(format, [row], given):
            try:
                to_example(format.name, row, fields, as_chat=True, source=source)
            except Rejected as why:
                problems.append(why)
    if not problems:
        return None
    # Turns with roles that nobody knows are turns. A format that misses a key of the turns is not what is meant.
    return max(problems, key=lambda why: (len(why.roles), why.reason != "missing_field"))


def _assignments(
    format: Format, rows: Sequence[Mapping[Any, Any]], given: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    """Yield the ways to take the fields of a format from the columns: field -> column."""

    def called(field: Field, found: Iterable[Any]) -> list[str]:
        if field.name in given:
            return [given[field.name]]
        found = [name for name in found if given.get(name) != NONE]
        by_name = {str(column).lower().strip(): str(column) for column in found}
        by_name |= {name: name for name in found}
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
    given: Mapping[str, str],
    source: Source | None,
) -> list[Interpretation]:
    """Return the reading with these columns; none if plain text would be one of several columns by another name."""
    used: set[str] = set()
    for field in format.fields:
        if field.name in fields and not field.in_turn:
            used.update(columns_in(fields[field.name]))
    left = {}
    for row in rows:
        for name, value in row.items():
            column = str(name)
            if value not in EMPTY and column not in used and given.get(column) != NONE:
                left[column] = column.lower().strip()
    own = {field if field in given else fields[field].lower().strip() for field in format.needed}
    if format.makes == "text" and own != {*format.needed} and not _is_most_of(rows, fields["text"]):
        return []
    called = {
        field: column
        for field, column in fields.items()
        if field != column or field in format.asked
    }
    called |= given
    examples: list[Example | None] = []
    for row in rows:
        try:
            examples.append(to_example(format.name, row, called, as_chat=True, source=source))
        except Rejected:
            examples.append(None)
    ignored = len(columns.KNOWN.intersection(left.values()))
    needed = tuple(fields[field] for field in format.needed)
    doubt = _doubt(format, own)
    if any(isinstance(row.get(column), int | float) for row in rows for column in needed):
        doubt += NUMBERS
    rank = (doubt, ignored, len(called), own_formats().index(format))
    return [Interpretation(format.name, called, needed, tuple(examples), rank, left)]


def _is_most_of(rows: Iterable[Mapping[Any, Any]], column: str) -> bool:
    # Plain text by another name is most of its row: beside it, there may be paths, names and numbers.
    sizes = Counter[str]()
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                sizes[str(name)] += len(value)
    return 2 * sizes.pop(column) > 3 * max(sizes.values(), default=0)


def _doubt(format: Format, own: set[str]) -> int:
    """Return how little the names of the needed columns say; lower is better."""
    if format.makes == "ids":
        return 4
    if format.makes == "text":
        return 3
    if own == {"messages"}:
        return 0
    if any(own == {*other.needed} for other in own_formats()):
        return 1
    return 2
