"""Formats of rows: each turns a raw row into an example, a chat, a prompt with its completion, or plain text.

Each format is a function from a `Row` to an `Example`; it raises `Rejected` for a row that cannot be used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.data.example import Completion, Example, Rejected, Text
from olora_ray.data.messages import chat, from_sharegpt, in_a_cell, kind, listed, sequence


@dataclass(frozen=True)
class Row:
    """The columns of a raw row, under the names that the format uses."""

    columns: Mapping[str, Any]
    fields: Mapping[str, str]
    as_chat: bool = False
    """Whether prompt and completion are turns of a chat (see form.py)."""

    def column(self, name: str) -> str:
        """The column of a field."""
        return self.fields.get(name, name)

    def value(self, name: str) -> Any:
        """The value of a field; raises Rejected("missing_field") if there is no such column or it is null."""
        column = self.column(name)
        if self.columns.get(column) is not None:
            return self.columns[column]
        if column in self.columns:
            raise Rejected("missing_field", f"field {column!r} is null")
        meant = f" (data fields: {name})" if column != name else ""
        there = f"is not there; the row has {listed(self.columns)}"
        raise Rejected("missing_field", f"field {column!r}{meant} {there}")

    def text(self, name: str) -> str:
        """The value of a text field; raises Rejected for another type."""
        return self._text(name, self.value(name))

    def optional(self, name: str) -> Any:
        """The value of a field, or None."""
        return self.columns.get(self.column(name))

    def optional_text(self, name: str) -> str:
        """The value of a text field, or "" where it is not there or null; raises Rejected for another type."""
        value = self.optional(name)
        return "" if value is None else self._text(name, value)

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise Rejected("wrong_type", f"field {self.column(name)!r} is {kind(value)}, not text")
        return value


def to_example(format: str, columns: Any, fields: Mapping[str, str], as_chat: bool = False) -> Example:
    """Read a raw row in `format`; raises Rejected.

    `as_chat` makes a chat of a prompt and its completion.
    """
    if not isinstance(columns, Mapping):
        raise Rejected("not_an_object", f"expected an object with fields, found {kind(columns)}")
    try:
        return FORMATS[format](Row(columns, fields, as_chat))
    except RecursionError:
        raise Rejected("wrong_type", "nested too deeply") from None


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
    return chat(sequence(row.value("messages"), "messages"), "role", "content", row.optional("tools"))


def _sharegpt(row: Row) -> Example:
    role, content = row.column("from"), row.column("value")
    turns = from_sharegpt(sequence(row.value("conversations"), "conversations"), role, content)
    if system := row.optional_text("system"):
        first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        if first.get(role) != "system":
            turns.insert(0, {role: "system", content: system})
        elif first.get(content) != system:
            where = f"field {row.column('system')!r} and the first message"
            raise Rejected("bad_role", f"{where} are two different system messages")
    return chat(turns, role, content, row.optional("tools"))


def _alpaca(row: Row) -> Example:
    instruction, answer = row.text("instruction"), row.text("output")
    extra = row.optional_text("input")
    turns: list[Any] = []
    if system := row.optional_text("system"):
        turns.append({"role": "system", "content": system})
    for question, earlier in _history(row):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": earlier}]
    asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return chat([*turns, *_turns(asked, answer)], "role", "content", None)


def _history(row: Row) -> list[Any]:
    """The earlier (question, answer) pairs of an alpaca row."""
    if not (value := row.optional("history")):
        return []
    pairs = sequence(value, row.column("history"))
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Rejected("wrong_type", f"field {row.column('history')!r} is not a list of [question, answer]")
    return pairs


def _prompt_completion(row: Row) -> Example:
    prompt, completion = (in_a_cell(row.value(name)) for name in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages_of_two(row, prompt, completion)
    prompt, completion = row.text("prompt"), row.text("completion")
    if not completion.strip():
        raise Rejected("empty_answer", f"field {row.column('completion')!r} is empty")
    if row.as_chat:
        return chat(_turns(prompt, completion), "role", "content", row.optional("tools"))
    if row.optional("tools") not in (None, "", "[]", []):
        raise Rejected("wrong_type", f"field {row.column('tools')!r}: a text without chat template has no place for it")
    return Completion(prompt, completion)


def _messages_of_two(row: Row, prompt: list[Any], completion: list[Any]) -> Example:
    """The chat of a prompt's messages and a completion's: what the prompt has of the assistant is not trained on."""
    if not row.as_chat:
        raise Rejected("wrong_type", "prompt and completion are lists of messages: a chat, which needs chat: true")
    if not any(_is_answer(turn) for turn in completion):
        raise Rejected("no_answer", f"field {row.column('completion')!r} has no message of the assistant")
    given = [{**turn, "weight": 0} if _is_answer(turn) else turn for turn in prompt]
    return chat([*given, *completion], "role", "content", row.optional("tools"))


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: Row) -> Example:
    text = row.text("text")
    if not text.strip():
        raise Rejected("empty_text", f"field {row.column('text')!r} is empty")
    return Text(text)


FORMATS: dict[str, Callable[[Row], Example]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _text,
}

NEEDED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields without which a row of a format cannot be used; what is told from fewest columns comes first."""

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations", "from", "value", "system", "tools"),
    "text": ("text",),
}
"""The names that `fields:` can map, for each format."""
