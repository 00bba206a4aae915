"""Formats of rows: each turns a raw row into an example, a chat, a prompt with its completion, or plain text.

Each format is a function from a `Row` to an `Example`; it raises `Rejected` for a row that cannot be used.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from olora_ray.common.errors import UserError

ROLES = {"developer", "system", "user", "assistant", "tool"}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
}


class Rejected(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason` is a short slug to count by; `message` is for the person who looks at the row."""
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message if len(message) <= 300 else message[:300] + "..."


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one answer of the assistant."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, without any template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


Example = Chat | Completion | Text


@dataclass(frozen=True)
class Row:
    """The columns of a raw row, under the names that the format uses."""

    columns: Mapping[str, Any]
    fields: Mapping[str, str]

    def value(self, name: str) -> Any:
        """The value of a field; raises Rejected("missing_field") if there is no such column or it is null."""
        column = self.fields.get(name, name)
        if self.columns.get(column) is not None:
            return self.columns[column]
        meant = f" (data fields: {name})" if column != name else ""
        what = "is null" if column in self.columns else f"is not there; the row has {_listed(self.columns)}"
        raise Rejected("missing_field", f"field {column!r}{meant} {what}")

    def text(self, name: str) -> str:
        """The value of a text field; raises Rejected for another type."""
        value = self.value(name)
        if not isinstance(value, str):
            raise Rejected("wrong_type", f"field {self.fields.get(name, name)!r} is {_kind(value)}, not text")
        return value

    def optional(self, name: str) -> Any:
        """The value of a field, or None."""
        return self.columns.get(self.fields.get(name, name))


def to_example(format: str, columns: Any, fields: Mapping[str, str]) -> Example:
    """Read a raw row in `format`; raises Rejected."""
    if not isinstance(columns, Mapping):
        raise Rejected("not_an_object", f"expected an object with fields, found {_kind(columns)}")
    return FORMATS[format](Row(columns, fields))


def check_fields(format: str, fields: Mapping[str, str], where: str) -> None:
    """Raise UserError if `fields` maps a name that the format does not have; `where` names the setting."""
    known = FIELDS[format]
    for name in fields:
        if name not in known:
            raise UserError(f"{where}.fields: format {format} has no field {name!r}; it has {', '.join(known)}")


def columns_of(format: str, fields: Mapping[str, str]) -> list[str]:
    """The columns of a file that the format reads."""
    return [fields.get(name, name) for name in FIELDS[format]]


def _messages(row: Row) -> Example:
    return _chat(_sequence(row.value("messages"), "messages"), "role", "content", row.optional("tools"))


def _sharegpt(row: Row) -> Example:
    turns = _sequence(row.value("conversations"), "conversations")
    role, content = row.fields.get("from", "from"), row.fields.get("value", "value")
    renamed = []
    for turn in turns:
        if isinstance(turn, Mapping) and turn.get(role) in SHAREGPT_ROLES:
            turn = {role: SHAREGPT_ROLES[turn[role]], content: turn.get(content)}
        renamed.append(turn)
    return _chat(renamed, role, content, None)


def _alpaca(row: Row) -> Example:
    instruction, answer = row.text("instruction"), row.text("output")
    extra = row.optional("input") or ""
    if not isinstance(extra, str):
        raise Rejected("wrong_type", f"field {row.fields.get('input', 'input')!r} is {_kind(extra)}, not text")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system := row.optional("system"):
        turns.insert(0, {"role": "system", "content": system})
    return _chat(turns, "role", "content", None)


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row.value("prompt"), row.value("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat([*prompt, *completion], "role", "content", row.optional("tools"))
    prompt, completion = row.text("prompt"), row.text("completion")
    if not completion.strip():
        raise Rejected("empty_answer", f"field {row.fields.get('completion', 'completion')!r} is empty")
    return Completion(prompt, completion)


def _text(row: Row) -> Example:
    text = row.text("text")
    if not text.strip():
        raise Rejected("empty_text", f"field {row.fields.get('text', 'text')!r} is empty")
    return Text(text)


FORMATS: dict[str, Callable[[Row], Example]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _text,
}

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "tools"),
    "alpaca": ("instruction", "input", "output", "system"),
    "sharegpt": ("conversations", "from", "value"),
    "text": ("text",),
}
"""The names that `fields:` can map, for each format."""


def _chat(turns: list[Any], role: str, content: str, tools: Any) -> Chat:
    messages = tuple(_message(turn, number, role, content) for number, turn in enumerate(turns, 1))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Rejected("no_answer", f"no message of the assistant; roles: {', '.join(roles) or 'none'}")
    first = next((name for name in roles if name not in ("system", "developer")), None)
    if first != "user":
        raise Rejected("bad_role", f"the first message after the system's must be the user's, not the {first}'s")
    for number, name in enumerate(roles[1:], 2):
        if name in ("system", "developer") and roles[number - 2] not in ("system", "developer"):
            raise Rejected("bad_role", f"message {number}: a {name} message must stand at the start")
    return Chat(messages, _tools(tools))


def _message(turn: Any, number: int, role: str, content: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise Rejected("wrong_type", f"message {number} is {_kind(turn)}, not an object with {role!r} and {content!r}")
    if not isinstance(turn.get(role), str):
        raise Rejected("missing_field", f"message {number} has no {role!r}; it has {_listed(turn)}")
    if turn[role] not in ROLES:
        raise Rejected("bad_role", f"message {number}: unknown role {turn[role]!r}; known: {', '.join(sorted(ROLES))}")
    # Arrow gives all messages of a file the same keys; templates want a missing key, not a null.
    rest = {key: value for key, value in turn.items() if value is not None and key not in (role, content)}
    text = _content(turn.get(content), number, content)
    if not text.strip() and not rest.get("tool_calls"):
        if turn[role] == "assistant":
            raise Rejected("empty_answer", f"message {number}: the assistant's {content!r} is empty")
        if content not in turn:
            raise Rejected("missing_field", f"message {number} has no {content!r}; it has {_listed(turn)}")
    return {"role": turn[role], "content": text, **rest}


def _content(value: Any, number: int, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    raise Rejected("wrong_type", f"message {number}: {name!r} is {_kind(value)}, not text")


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise Rejected("wrong_type", "field 'tools' is text, but not JSON") from None
    if not value:
        return None
    return tuple(_sequence(value, "tools"))


def _sequence(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):  # csv and some parquet files hold conversations as JSON text
        try:
            value = json.loads(value)
        except ValueError:
            raise Rejected("wrong_type", f"field {name!r} is text, not a list of messages") from None
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"field {name!r} is {_kind(value)}, not a list")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _listed(columns: Mapping[str, Any]) -> str:
    names = [str(name) for name in columns]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no fields"
