"""A format of rows: its fields, and the function that turns a raw row into an example.

One file beside this one is one format. Its `FORMAT` is all that other code may ask about it: detection, the columns to
read, the digest of the tokens, the dry run, `olora-ray init` and the exported chat template follow from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

# Characters of a message about a rejected row.
LONGEST_MESSAGE = 400
NONE = "none"
"""A column of this name in `fields` leaves out the field, or the column, of the name that is mapped to it."""
# Values of a column that count as empty.
EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")


class Rejected(Exception):
    def __init__(self, reason: str, message: str) -> None:
        """Store a short slug to count by, and one line for the person who looks at the row."""
        self.reason = reason
        self.message = one_line(message)
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


class Row(NamedTuple):
    """The columns of a raw row, under the names that the format uses."""

    columns: Mapping[str, Any]
    fields: Mapping[str, str]
    as_chat: bool = False
    """True if prompt and completion become turns of a chat (tokenize.py: as_chat)."""

    def column(self, name: str) -> str:
        return self.fields.get(name, name)

    def value(self, name: str) -> Any:
        """Return the value of a field; raise Rejected("missing_field") if its column is missing or null."""
        column = self.column(name)
        if self.columns.get(column) is not None:
            return self.columns[column]
        if column in self.columns:
            raise Rejected("missing_field", f"field {column!r} is null")
        problem = f"field {column!r}"
        if column != name:
            problem += f" (set as {name} in fields)"
        problem += f" is missing; the row has {listed(self.columns)}"
        raise Rejected("missing_field", problem)

    def text(self, name: str) -> str:
        return self._text(name, self.value(name))

    def optional(self, name: str) -> Any:
        return self.columns.get(self.column(name))

    def optional_text(self, name: str) -> str:
        """Return a text field, or "" if it is missing or null; raise Rejected for another type."""
        value = self.optional(name)
        if value is None:
            return ""
        return self._text(name, value)

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise Rejected(
                "wrong_type", f"field {self.column(name)!r} is {type_name(value)}, not text"
            )
        return value


@dataclass(frozen=True)
class Field:
    """A field of a format: a column of its rows, or a key of the turns in its first column."""

    name: str
    other_names: tuple[str, ...] = ()
    """Names of this field in other data sets, for the detection; the first that a row has is taken."""
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
