"""A format of rows: its fields, and the function that turns a raw row into an example.

One file beside this one is one format. Its `FORMAT` is all that other code may ask about it: detection, the columns to
read, the digest of the tokens, the dry run, `olora-ray init` and the exported chat template follow from it.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

# Characters of a message about a rejected row.
LONGEST_MESSAGE = 400
NONE = "none"
"""A column of this name in `fields` leaves out the field, or the column, of the name that is mapped to it."""
# Values of a column that count as empty.
EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
"""In a template: a literal brace, the path of a value, or a brace without its partner."""


class Rejected(Exception):
    def __init__(self, reason: str, message: str, roles: Sequence[str] = ()) -> None:
        """Store a short slug to count by, and one line for the person who looks at the row.

        `roles` are the names of roles in the row that nobody knows.
        """
        self.reason = reason
        self.message = one_line(message)
        self.roles = roles
        super().__init__(f"{reason}: {self.message}")


def one_line(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Shorten a text to one line: names of columns and parts of rows may hold line breaks and half surrogate pairs."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    if len(line) > most:
        line = line[:most] + "..."
    return line


class Chat(NamedTuple):
    """A conversation with at least one answer of the assistant."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None


class Completion(NamedTuple):
    """A prompt and its completion, without a chat template."""

    prompt: str
    completion: str


class Text(NamedTuple):
    text: str


class Ids(NamedTuple):
    """A row that is already tokenised. A label is the token at its place, or -100 if that is not supervised."""

    ids: list[int]
    labels: list[int] | None = None
    mask: list[int] | None = None


Example = Chat | Completion | Text | Ids


Makes = Literal["chat", "completion", "text", "ids"]
"""The type of a format's examples. completion: a prompt with its completion, which `chat` of a source makes a chat."""
EXAMPLES: Mapping[Makes, tuple[type, ...]] = {
    "chat": (Chat,),
    "completion": (Completion, Chat),
    "text": (Text,),
    "ids": (Ids,),
}


def type_name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if type(value) in names:
        return names[type(value)]
    if isinstance(value, int | float):
        return "a number"
    return type(value).__name__


def listed(columns: Mapping[str, Any]) -> str:
    if not columns:
        return "no fields"
    names = [str(name) for name in columns]
    if len(names) > 12:
        names[12:] = ["..."]
    return ", ".join(names)


Labels = Mapping[str, tuple[str, ...]]


@lru_cache(2**10)
def columns_in(written: str) -> tuple[str, ...]:
    """Return the top-level columns that a value of `fields` may read: a column's name, a path or a template.

    The value itself comes first: a column of exactly this name wins.
    """
    names = [written]
    for path in [path for path in BRACES.findall(written) if path] or [written]:
        names += [path, path.partition(".")[0]]
    return tuple(dict.fromkeys(names))


def value_at(columns: Mapping[str, Any], written: str, labels: Labels) -> Any:
    """Return what a value of `fields` reads in a row; None if the row lacks its column, or has a null on the way.

    Raise Rejected for a path that leads nowhere in this row, and for a template of which a value is missing. `labels`
    has the names of numbers, by their columns.
    """
    if written in columns:
        value = columns[written]
        if written in labels and value is not None:
            return _label(value, labels[written], written)
        return value
    if BRACES.search(written):
        return BRACES.sub(lambda brace: _filled(brace, columns, written, labels), written)
    column, _, path = written.partition(".")
    if not path or column not in columns:
        return None
    value = value_at(columns, column, labels)
    for key in path.split("."):
        if value is None:
            return None
        value = _inside(value, key, column)
        column = f"{column}.{key}"
    return value


def _filled(brace: re.Match[str], columns: Mapping[str, Any], template: str, labels: Labels) -> str:
    if brace[0] in ("{{", "}}"):
        return brace[0][0]
    path = brace[1]
    if path is None:
        problem = f"fields: {template!r} has a single {brace[0]}; write {2 * brace[0]} for the sign itself"
        raise Rejected("bad_template", problem)
    value = value_at(columns, path, labels)
    if value is None:
        raise _missing(columns, path, f"field {path!r} (of {template!r} in fields)")
    return as_text(value, path)


def _missing(columns: Mapping[str, Any], written: str, what: str) -> Rejected:
    # A column that is null, or holds a null on the way, is there.
    if any(name in columns for name in columns_in(written)):
        return Rejected("missing_field", f"{what} is null")
    return Rejected("missing_field", f"{what} is missing; the row has {listed(columns)}")


def _inside(value: Any, key: str, path: str) -> Any:
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        has = f"it has {listed(value)}"
    elif isinstance(value, list):
        if key.isdecimal() and int(key) < len(value):
            return value[int(key)]
        has = f"it is a list of {len(value)}, counted from 0"
    else:
        has = f"it is {type_name(value)}"
    raise Rejected("missing_field", f"field {path!r} has no {key!r}: {has}")


def _label(value: Any, names: tuple[str, ...], column: str) -> Any:
    if isinstance(value, list):
        return [_label(each, names, column) for each in value]
    if value in names:
        return value
    number = str(value)  # a cell of csv is text
    if number.isdecimal() and int(number) < len(names):
        return names[int(number)]
    problem = f"field {column!r} is {number}; labels has names for 0 to {len(names) - 1}"
    raise Rejected("no_label", problem)


def as_text(value: Any, column: str) -> str:
    """Return a text, or a number or a boolean as JSON writes it; raise Rejected for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    problem = f"field {column!r} is {type_name(value)}, not text"
    path = column
    while value and isinstance(value, list | Mapping):
        entries: Iterable[tuple[Any, Any]] = enumerate(value)
        if isinstance(value, Mapping):
            entries = value.items()
        key, value = next(iter(entries))
        path = f"{path}.{key}"
    if path != column:
        problem += f"; name a value in it, such as {path}"
    raise Rejected("wrong_type", problem)


class Row(NamedTuple):
    """The columns of a raw row, under the names that the format uses."""

    columns: Mapping[str, Any]
    fields: Mapping[str, str]
    as_chat: bool = False
    """True if prompt and completion become turns of a chat (tokenize.py: as_chat)."""
    roles: Mapping[str, str] = {}
    """`roles` of the source."""
    labels: Labels = {}  # noqa: RUF012
    """`labels` of the source."""
    markup: str = "none"
    """The markup of texts that are chats."""

    def column(self, name: str) -> str:
        """Return what `fields` says for a field: a column, a path or a template."""
        return self.fields.get(name, name)

    def value(self, name: str) -> Any:
        """Return the value of a field; raise Rejected("missing_field") if its column is missing or null."""
        column = self.column(name)
        value = value_at(self.columns, column, self.labels)
        if value is not None:
            return value
        what = f"field {column!r}"
        if column != name and column not in self.columns:
            what += f" (set as {name} in fields)"
        raise _missing(self.columns, column, what)

    def text(self, name: str) -> str:
        """Return a text field that is needed; a number or a boolean is text here."""
        return as_text(self.value(name), self.column(name))

    def optional(self, name: str) -> Any:
        return value_at(self.columns, self.column(name), self.labels)

    def optional_text(self, name: str) -> str:
        """Return a text field, or "" if it is missing or null; raise Rejected for another type.

        A number or a boolean is text only if `fields` names its column: a column such as `system: true` may mean
        something else.
        """
        value = self.optional(name)
        if value is None:
            return ""
        column = self.column(name)
        if isinstance(value, int | float) and name not in self.fields:
            raise Rejected("wrong_type", f"field {column!r} is {type_name(value)}, not text")
        return as_text(value, column)


@dataclass(frozen=True)
class Field:
    """A field of a format: a column of its rows, or a key of the turns in its first column."""

    name: str
    other_names: tuple[str, ...] = ()
    """Names of this field in other data sets, for the detection; the first that a row has is taken."""
    last_names: tuple[str, ...] = ()
    """Names that many columns have; they count only in rows without any of the names above."""
    needed: bool = False
    """True if a row without it cannot be used."""
    asked: bool = False
    """True if it is read only if `fields` maps it, as detection does: earlier stores without it keep their digests."""
    in_turn: bool = False
    """True if it is a key of a turn, and no column."""


@dataclass(frozen=True)
class Format:
    name: str
    """The value of `format` in a source."""
    read: Callable[[Row], Example]
    """Return the example of a row; raise Rejected if the row cannot be used."""
    makes: Makes
    fields: tuple[Field, ...]
    tools: bool = False
    """True if its chats may have tool calls."""
    rules: int = 1
    """Raised by one whenever the tokens of its rows change."""

    def __post_init__(self) -> None:
        # Detection would take any rows for a format that needs no column.
        if not self.needed:
            raise ValueError(f"format {self.name}: give one of its fields needed=True")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @cached_property
    def needed(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields if field.needed)

    @cached_property
    def asked(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields if field.asked)

    @property
    def has_turns(self) -> bool:
        """True if one column holds a chat of any number of turns."""
        return self.makes == "chat" and len(self.needed) == 1

    def is_chat(self, wanted: bool) -> bool:
        """True if its rows are chats; `wanted` is the choice of a source for a prompt with its completion."""
        if self.makes == "completion":
            return wanted
        return self.makes == "chat"

    def takes(self, chat: bool | Literal["auto"]) -> bool:
        """True if a source of this format may have this value of `chat`."""
        if chat == "auto" or self.makes == "completion":
            return True
        return self.makes == ("chat" if chat else "text")
