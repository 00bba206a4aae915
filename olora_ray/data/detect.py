"""First look at the data of a run: sources without files or with rows of another format, and detection of formats.

It reads a few rows of a few files, and imports neither torch nor Ray. It refuses a source if none of these rows can
be used; the preparation, which reads all rows, judges everything else.
"""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.config.section import Source, is_auto
from olora_ray.data import columns, reader
from olora_ray.data.formats import own_formats, to_example
from olora_ray.data.formats.chat import sequence
from olora_ray.data.formats.format import EMPTY, NONE, Example, Field, Format, Rejected, listed
from olora_ray.data.scan import head
from olora_ray.data.sources import File, grouped, list_files, say_once

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
            _check(source, where, config.run.storage)
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
        for number, source in enumerate(grouped(config, sources)):
            named[f"{setting}.{number}"] = source
    return named


def read_as(source: Source, where: str, storage_root: str) -> Source:
    if not is_auto(source.format):
        if source.path.startswith("hf://"):  # `check` does not download it
            _check(source, where, storage_root)
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
    rows = [row for _, _, row in looked]
    other = None
    try:
        reading = find(rows, source.fields, source.chat)
        if reading is None:
            other = find(rows, source.fields)
    except UserError as unclear:
        raise UserError(f"{where}: {unclear}") from None
    if other is not None:
        raise UserError(f"{where}.{source.wrong_chat(other.format)}")
    if reading is None:
        raise _unusable(where, looked, why_not(looked[0][2], source.fields, where))
    known = source.model_copy(update={"format": reading.format, "fields": reading.fields})
    read = [row for row in rows if isinstance(row, Mapping)]
    _answered(where, known, zip(read, reading.examples, strict=True), auto=True)
    kinds = " and ".join(dict.fromkeys(file.form for file, _, _ in looked))
    words = f"{reading.format} rows in {kinds}"
    for field, column in reading.fields.items():
        words += f"; {field}: {column}"
    if reading.unread:
        words += f"; not read: {listed(reading.unread)}"
    return known, words


def _answered(
    where: str, source: Source, read: Iterable[tuple[Any, Example | None]], auto: bool
) -> None:
    notes = Counter[str]()
    used = [(row, example) for row, example in read if example]
    setting, _, place = where.rpartition(".")
    number = int(place)
    for row, example in used:
        columns.note_unread(notes, number, source, row, example)
    error = columns.unresolved_error(notes, {number: source}, setting, len(used), auto)
    if error:
        raise error


def _check(source: Source, where: str, storage_root: str) -> None:
    looked = []
    read = []
    problems = []
    # The model is not known yet, so rows that are a chat only with its template pass.
    as_chat = source.chat is not False
    for entry in _looked(source, where, storage_root):
        looked.append(entry)
        row = entry[2]
        try:
            read.append((row, to_example(source.format, row, source.fields, as_chat)))
        except Rejected as why:
            problems.append(why)
    if problems and not read:
        raise _unusable(
            where, looked, problems[0], "; remove format and fields to have them detected"
        )
    _answered(where, source, read, auto=False)


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

    def settings(self) -> str:
        settings = f"format: {self.format}"
        if self.fields:
            shown = ", ".join(f"{field}: {column}" for field, column in self.fields.items())
            settings += f", fields: {{{shown}}}"
        return settings


def find(
    rows: Sequence[Any], given: Mapping[str, str], chat: Literal["auto"] | bool = "auto"
) -> Interpretation | None:
    """Detect how rows are meant; return None if no format can use any of them.

    `given` are the fields, and `chat` the choice, that their source sets. Raise UserError if two readings are equally
    good.
    """
    rows = [row for row in rows if isinstance(row, Mapping)]
    meant = {field for field, column in given.items() if column != NONE}
    candidates = []
    for format in own_formats():
        if meant <= set(format.names) and format.takes(chat):
            for fields in _assignments(format, rows, given):
                candidates += _reading(format, fields, rows, given)
    # Files may have a few rows of another form: a reading for less than half as many rows as the best does not count.
    most = max((reading.used for reading in candidates), default=0)
    readings = [reading for reading in candidates if 2 * reading.used > most]
    if not readings:
        return None
    readings.sort(key=lambda each: each.rank)
    best = readings[0]
    rivals = [
        each
        for each in readings
        if each.rank[:2] == best.rank[:2] and set(each.columns) != set(best.columns)
    ]
    if rivals:
        raise UserError(
            f"the rows can be read in two ways; set {best.settings()}, or {rivals[0].settings()}"
        )
    return best


def why_not(row: Any, given: Mapping[str, str], where: str) -> Rejected:
    try:
        if not isinstance(row, Mapping):
            to_example("text", row, {})
        for format in own_formats():
            for fields in _assignments(format, [row], given):
                to_example(format.name, row, fields, as_chat=True)
    except Rejected as why:
        return why
    # The columns may have names of another language.
    texts = [
        name
        for name, value in row.items()
        if isinstance(value, str) and columns.severity("text", name, value)
    ]
    problem = f"no format has its columns ({listed(row)}); set format and fields"
    if len(texts) > 1:
        mapped = {**given, "instruction": texts[0], "output": texts[1]}
        problem += f", such as {columns.fields(where, mapped)}"
    return Rejected("missing_field", problem)


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
        return [by_name[name] for name in (field.name, *field.other_names) if name in by_name]

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
                free = called(field, set(every) - set(fields.values()))
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
) -> list[Interpretation]:
    """Return the reading with these columns; none if plain text would be one of several columns by another name."""
    used = {
        fields[field.name] for field in format.fields if field.name in fields and not field.in_turn
    }
    left = {}
    for row in rows:
        for name, value in row.items():
            column = str(name)
            if value not in EMPTY and column not in used and given.get(column) != NONE:
                left[column] = column.lower().strip()
    own = {field if field in given else fields[field].lower().strip() for field in format.needed}
    if format.makes == "text" and left and own != {*format.needed}:
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
            examples.append(to_example(format.name, row, called, as_chat=True))
        except Rejected:
            examples.append(None)
    ignored = len(columns.KNOWN.intersection(left.values()))
    rank = (_doubt(format, own), ignored, len(called), own_formats().index(format))
    needed = tuple(fields[field] for field in format.needed)
    return [Interpretation(format.name, called, needed, tuple(examples), rank, left)]


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
