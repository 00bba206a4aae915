"""Formats of rows: each turns a raw row into an example (a chat, a prompt with its completion, or plain text).

Each format is a function from a `Row` to an `Example`; it raises `Rejected` for a row that cannot be used.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from olora_ray.common.errors import UserError

# Characters of a message about a rejected row.
LONGEST_MESSAGE = 400


class Rejected(Exception):
    def __init__(self, reason: str, message: str) -> None:
        """Store a short slug to count by, and one line for the person who looks at the row."""
        self.reason = reason
        self.message = one_line(message)
        super().__init__(f"{reason}: {self.message}")


def one_line(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Shorten a text to one line: names of columns and parts of rows may hold line breaks and half surrogate pairs."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= most else line[:most] + "..."


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


# Messages of a row to a chat: roles, content, tool calls, tools.

ROLES = {"developer", "system", "user", "assistant", "tool"}
# Roles of format sharegpt, and their names in our chats.
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
# Values of a column that count as empty.
EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
# Types of content parts that are text. Images may have a `text` too, and reasoning is not part of an answer.
TEXTS = (None, "text", "input_text", "output_text")
# Keys under which messages hold the reasoning before an answer.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Keys by which Axolotl, ms-swift and LLaMA-Factory mark whether an answer is supervised.
MARKS = ("train", "training", "loss")
# Role of a tool call in format sharegpt; the turn's value is JSON text.
CALL = "function_call"


def chat(turns: list[Any], role: str, content: str, tools: Any) -> Chat:
    """Return the chat of turns whose keys are `role` and `content`; raise Rejected if they are not a valid chat."""
    messages = tuple(
        [_message(turn, number, role, content) for number, turn in enumerate(turns, 1)]
    )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Rejected("no_answer", f"no assistant message; roles: {', '.join(roles) or 'none'}")
    first = next((name for name in roles if name not in ("system", "developer")), None)
    if first != "user":
        raise Rejected(
            "bad_role",
            f"the first message after the system message must be from user, not from {first}",
        )
    for number, (before, name) in enumerate(itertools.pairwise(roles), 2):
        if name in ("system", "developer") and before not in ("system", "developer"):
            raise Rejected(
                "bad_role", f"message {number}: a {name} message is allowed only at the start"
            )
    return Chat(messages, _tools(tools))


def sequence(value: Any, name: str) -> list[Any]:
    """Return a list, or the list in a JSON text (csv and some parquet files); raise Rejected for anything else.

    Also restores a list that `datasets` has stored as a Sequence of objects: {"role": [...], "content": [...]}.
    """
    if isinstance(value, str):
        value = _parsed(value, f"field {name!r} is text, not a list of messages")
    value = _turned_back(value)
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"field {name!r} is {type_name(value)}, not a list")
    return value


def in_a_cell(value: Any) -> Any:
    # csv holds messages as JSON text; a value that is no list of messages stays unchanged.
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return _turned_back(value)
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return turns if isinstance(turns, list) and turns and all(map(_has_role, turns)) else value


def _turned_back(value: Any) -> Any:
    # {"role": [...], "content": [...]} -> [{"role": ..., "content": ...}, ...]; any other value stays unchanged.
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(part, list) for part in value.values())
    ):
        return value
    if len({len(part) for part in value.values()}) > 1:
        return value
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


def _has_role(turn: Any) -> bool:
    return isinstance(turn, dict) and "role" in turn and ("content" in turn or "tool_calls" in turn)


def type_name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else type(value).__name__
    )


def listed(columns: Mapping[str, Any]) -> str:
    names = [str(name) for name in columns]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no fields"


def _message(turn: Any, number: int, role: str, content: str) -> dict[str, Any]:
    if type(turn) is dict and turn.keys() == {
        role,
        content,
    }:  # most turns, in a quarter of the time
        name, text = turn[role], turn[content]
        if type(name) is type(text) is str and name in ROLES and text.strip():
            return {"role": name, "content": text}
    if not isinstance(turn, Mapping):
        raise Rejected(
            "wrong_type",
            f"message {number} is {type_name(turn)}, not an object with {role!r} and {content!r}",
        )
    if not isinstance(turn.get(role), str):
        hint = (
            "; from and value need format: sharegpt, and no fields"
            if role == "role" and "from" in turn
            else ""
        )
        raise Rejected(
            "missing_field", f"message {number} has no {role!r}; it has {listed(turn)}{hint}"
        )
    if turn[role] not in ROLES:
        hint = (
            f"; format: sharegpt has the role {turn[role]!r}"
            if turn[role] in (*SHAREGPT_ROLES, CALL)
            else ""
        )
        raise Rejected(
            "bad_role",
            f"message {number}: unknown role {turn[role]!r}; known: {', '.join(sorted(ROLES))}{hint}",
        )
    # Templates want a missing key, not a null.
    rest = {
        key: without_nulls(value)
        for key, value in turn.items()
        if value is not None and key not in (role, content)
    }
    marks = [rest.pop(key) for key in MARKS if rest.get(key) in (False, True)]
    if False in marks and turn[role] == "assistant":
        rest["weight"] = 0
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], f"message {number}: 'tool_calls'")
        if not rest[
            "tool_calls"
        ]:  # servers write [] without calls, but templates only check whether the key exists
            del rest["tool_calls"]
    text = _content(turn.get(content), number, content)
    if not text.strip() and not rest.get("tool_calls"):
        if turn[role] == "assistant":
            raise Rejected(
                "empty_answer", f"message {number}: {content!r} of the assistant is empty"
            )
        if content not in turn:
            raise Rejected(
                "missing_field", f"message {number} has no {content!r}; it has {listed(turn)}"
            )
    if rest.get("weight", 1) not in (0, 1):
        raise Rejected(
            "wrong_type", f"message {number}: weight must be 0 or 1, not {rest['weight']!r}"
        )
    return {**rest, "role": turn[role], "content": text}


def _renamed(turn: Any, number: int, role: str, content: str) -> Any:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
        return turn
    if turn[role] == CALL:
        return {
            **turn,
            role: "assistant",
            content: None,
            "tool_calls": _calls(turn.get(content), number),
        }
    return {**turn, role: SHAREGPT_ROLES.get(turn[role], turn[role])}


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    problem = f"message {number}: the value of a {CALL} is not JSON text of {{name, arguments}}"
    parsed = _parsed(value, problem) if isinstance(value, str) else without_nulls(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        raise Rejected("wrong_type", problem)
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def _content(value: Any, number: int, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        if type_ := next((part["type"] for part in value if part.get("type") not in TEXTS), None):
            raise Rejected(
                "wrong_type",
                f"message {number}: {name!r} has a part of type {type_!r}, which is not text",
            )
        if any(part.get(key) == 0 for part in value for key in (*MARKS, "weight")):
            raise Rejected(
                "wrong_type", f"message {number}: {name!r} has a part that is not to be trained"
            )
        return "".join(part["text"] for part in value)
    raise Rejected("wrong_type", f"message {number}: {name!r} is {type_name(value)}, not text")


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "field 'tools' is text, but not JSON")
    else:
        value = without_nulls(value)
    if not value:
        return None
    return tuple(_objects(sequence(value, "tools"), "field 'tools'"))


def _tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _parsed(value, f"{what} is text, but not JSON") if value.strip() else []
    return _objects(value, what)


def _objects(values: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(values, list):
        raise Rejected("wrong_type", f"{what} is {type_name(values)}, not a list of objects")
    for value in values:
        if not isinstance(value, dict):
            raise Rejected(
                "wrong_type", f"{what} must contain only objects, not {type_name(value)}"
            )
    return values


def without_nulls(value: Any) -> Any:
    """Return the value without the keys, at any depth, whose value is null; null entries of lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _parsed(text: str, otherwise: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Rejected("wrong_type", otherwise) from None


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
        meant = f" (set as {name} in fields)" if column != name else ""
        missing = f"is missing; the row has {listed(self.columns)}"
        raise Rejected("missing_field", f"field {column!r}{meant} {missing}")

    def text(self, name: str) -> str:
        return self._text(name, self.value(name))

    def optional(self, name: str) -> Any:
        return self.columns.get(self.column(name))

    def optional_text(self, name: str) -> str:
        """Return a text field, or "" if it is missing or null; raise Rejected for another type."""
        value = self.optional(name)
        return "" if value is None else self._text(name, value)

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise Rejected(
                "wrong_type", f"field {self.column(name)!r} is {type_name(value)}, not text"
            )
        return value


def to_example(
    format: str, columns: Any, fields: Mapping[str, str], as_chat: bool = False
) -> Example:
    """Read a raw row in `format`; raise Rejected if it cannot be used.

    `columns` may be a Rejected instead of a row: the reader could not read it. `as_chat` turns a prompt and its
    completion into a chat.
    """
    if isinstance(columns, Rejected):
        raise columns
    if not isinstance(columns, Mapping):
        raise Rejected(
            "not_an_object", f"expected an object with fields, found {type_name(columns)}"
        )
    try:
        return FORMATS[format](
            Row(columns, {**dict.fromkeys(ASKED.get(format, ()), NONE), **fields}, as_chat)
        )
    except RecursionError:
        raise Rejected("wrong_type", "nested too deeply") from None


def check_fields(format: str, fields: Mapping[str, str], where: str) -> None:
    """Raise UserError if `fields` maps a name that the format does not have; `where` is the setting of the source.

    Any name may be mapped to `NONE`: its column, or key of a message, is left out.
    """
    known = FIELDS.get(format) or tuple(dict.fromkeys(itertools.chain(*FIELDS.values())))
    if unknown := [name for name, column in fields.items() if name not in known and column != NONE]:
        raise UserError(
            f"{where}.fields: format {format} has no field {unknown[0]!r}; it has {', '.join(known)}"
        )


def columns_of(format: str, fields: Mapping[str, str]) -> list[str]:
    return [
        fields.get(name, name)
        for name in FIELDS[format]
        if name in fields or name not in ASKED.get(format, ())
    ]


def column_of(name: str, fields: Mapping[str, str]) -> str:
    """Return the column of a name that need not be a field, also if the format is to leave it out."""
    return name if fields.get(name) == NONE else fields.get(name, name)


def _messages(row: Row) -> Example:
    turns = _after_system(row, sequence(row.value("messages"), "messages"), "role", "content")
    return chat(turns, "role", "content", row.optional("tools"))


def _sharegpt(row: Row) -> Example:
    role, content = row.column("from"), row.column("value")
    given = sequence(row.value("conversations"), "conversations")
    # Entries that are no turns stay as they are, for `chat` to reject.
    turns = [_renamed(turn, number, role, content) for number, turn in enumerate(given, 1)]
    return chat(_after_system(row, turns, role, content), role, content, row.optional("tools"))


def _after_system(row: Row, turns: list[Any], role: str, content: str) -> list[Any]:
    # Anthropic and Bedrock write the system message beside the others, as a text or as a list of parts.
    if (value := row.optional("system")) is None:
        return turns
    system = (
        _content(value, 0, "system") if isinstance(value, list) else row.optional_text("system")
    )
    if not system:
        return turns
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    if first.get(role) != "system":
        return [{role: "system", content: system}, *turns]
    if _content(first.get(content), 1, content) != system:
        where = f"field {row.column('system')!r} and the first message"
        raise Rejected("bad_role", f"{where} have different system messages")
    return turns


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
    if not (value := row.optional("history")):
        return []
    pairs = sequence(value, row.column("history"))
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Rejected(
            "wrong_type",
            f"field {row.column('history')!r} is not a list of [question, answer] pairs",
        )
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
        raise Rejected(
            "wrong_type",
            f"field {row.column('tools')!r} needs a chat: set chat: true, or remove the tools",
        )
    return Completion(prompt, completion)


def _messages_of_two(row: Row, prompt: list[Any], completion: list[Any]) -> Example:
    # Assistant messages of the prompt are context, so they get weight 0.
    if not row.as_chat:
        raise Rejected("wrong_type", "prompt and completion are lists of messages; set chat: true")
    if not any(_is_answer(turn) for turn in completion):
        raise Rejected("no_answer", f"field {row.column('completion')!r} has no assistant message")
    context = [{**turn, "weight": 0} if _is_answer(turn) else turn for turn in prompt]
    return chat([*context, *completion], "role", "content", row.optional("tools"))


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: Row) -> Example:
    text = row.text("text")
    if not text.strip():
        raise Rejected("empty_text", f"field {row.column('text')!r} is empty")
    return Text(text)


def _tokens(row: Row) -> Example:
    ids = row.value("input_ids")
    lists = {name: ids if name == "input_ids" else row.optional(name) for name in FIELDS["tokens"]}
    for name, numbers in lists.items():
        whole = isinstance(numbers, list) and all(
            type(each) in (int, bool) and abs(each) < 2**31 for each in numbers
        )
        if numbers is not None and not whole:
            raise Rejected(
                "wrong_type", f"field {row.column(name)!r} is not a list of whole numbers"
            )
    labels, mask = lists["labels"], lists["attention_mask"]
    for marks in filter(
        None, (lists["completion_mask"], lists["assistant_masks"])
    ):  # TRL's: 1 is supervised
        if len(marks) != len(ids):
            raise Rejected(
                "wrong_length", f"a mask with {len(marks)} numbers for {len(ids)} input_ids"
            )
        labels = [
            label if mark else -100 for label, mark in zip(labels or ids, marks, strict=False)
        ]
    positions = list(itertools.compress(lists["position_ids"] or (), mask or itertools.repeat(1)))
    if any(later <= earlier for earlier, later in itertools.pairwise(positions)):
        raise Rejected(
            "wrong_type",
            f"field {row.column('position_ids')!r} starts again: the row holds several rows",
        )
    return Ids(ids, labels, mask)


FORMATS: dict[str, Callable[[Row], Example]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _text,
    "tokens": _tokens,
}

# Fields without which a format cannot use a row. The order of the formats decides between equally good ones.
NEEDED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}

# Fields that are read only if `fields` maps them, as detection does: earlier stores without them keep their digests.
ASKED = {"messages": ("system",), "tokens": ("completion_mask", "assistant_masks", "position_ids")}
# A column of this name in `fields` leaves out the field, or the column, of the name that is mapped to it.
NONE = "none"
# Names that a source's `fields` may map.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations", "from", "value", "system", "tools"),
    "text": ("text",),
    "tokens": (
        "input_ids",
        "labels",
        "attention_mask",
        "completion_mask",
        "assistant_masks",
        "position_ids",
    ),
}

# Names that other data sets use for the fields of our formats.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "input": ("context", "article", "passage"),
    "system": ("system_prompt", "system_message", "system_instruction"),
    "prompt": ("question", "query", "instruction", "input", "problem", "user"),
    "completion": (
        "answer",
        "response",
        "output",
        "target",
        "solution",
        "label",
        "chosen",
        "assistant",
        "generation",
    ),
    "instruction": ("prompt", "question", "query", "problem", "user"),
    "output": (
        "answer",
        "response",
        "completion",
        "target",
        "solution",
        "label",
        "chosen",
        "assistant",
        "generation",
    ),
    "messages": ("conversation", "conversations", "chat", "dialogue", "dialog", "turns"),
    "conversations": ("conversation", "messages", "chat", "dialogue", "dialog", "turns"),
    "from": ("role", "speaker"),
    "value": ("content", "text"),
    "text": ("content", "document", "body", "article", "passage"),
}
# Fields that are keys of a turn, and no columns.
INSIDE = ("from", "value")
