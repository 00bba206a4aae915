"""Formats of rows: each turns a raw row into an example, a chat, a prompt with its completion, or plain text.

Each format is a function from a `Row` to an `Example`; it raises `Rejected` for a row that cannot be used.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olora_ray.common.errors import UserError

LONGEST_MESSAGE = 400
"""Characters of a message about a rejected row."""


class Rejected(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, message: str) -> None:
        """`reason` is a short slug to count by; `message` is for the person who looks at the row: one line."""
        self.reason = reason
        self.message = one_line(message)
        super().__init__(f"{reason}: {self.message}")


def one_line(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Shorten what names columns or parts of a row: line breaks and half surrogate pairs may be in it."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= most else line[:most] + "..."


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


# Messages of a row to a chat: roles, content, tool calls, tools.


ROLES = {"developer", "system", "user", "assistant", "tool"}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
"""Other names of roles that rows of format sharegpt have."""
EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
"""Values of columns that say nothing."""
TEXTS = (None, "text", "input_text", "output_text")
"""Types of the parts of a content; pictures may have a `text` too, and reasoning is no part of an answer."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which messages have the reasoning before an answer."""
MARKS = ("train", "training", "loss")
"""Keys with which Axolotl, ms-swift and LLaMA-Factory say whether an answer is supervised."""
CALL = "function_call"
"""Role of a tool call in format sharegpt; its value is JSON text."""


def chat(turns: list[Any], role: str, content: str, tools: Any) -> Chat:
    """The chat of a list of turns, whose keys are `role` and `content`; raises Rejected."""
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


def from_sharegpt(turns: list[Any], role: str, content: str) -> list[Any]:
    """The turns with the roles of `ROLES`; what is no turn stays as it is, for `chat` to reject."""
    return [_renamed(turn, number, role, content) for number, turn in enumerate(turns, 1)]


def sequence(value: Any, name: str) -> list[Any]:
    """A list, or the list in a JSON text, as csv and some parquet files hold it; raises Rejected.

    Also one that `datasets` has turned over, as its Sequence of objects is stored: {"role": [...], "content": [...]}.
    """
    if isinstance(value, str):
        value = _parsed(value, f"field {name!r} is text, not a list of messages")
    value = _turned_back(value)
    if not isinstance(value, list):
        raise Rejected("wrong_type", f"field {name!r} is {kind(value)}, not a list")
    return value


def in_a_cell(value: Any) -> Any:
    """The messages in a JSON text, as csv holds them, or in lists of their parts; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return _turned_back(value)
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) and found and all(map(_has_role, found)) else value


def _turned_back(value: Any) -> Any:
    """A list of objects, of an object of lists of one length; any other value as it is."""
    if not isinstance(value, dict) or not value or not all(isinstance(part, list) for part in value.values()):
        return value
    if len({len(part) for part in value.values()}) > 1:
        return value
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


def _has_role(turn: Any) -> bool:
    return isinstance(turn, dict) and "role" in turn and ("content" in turn or "tool_calls" in turn)


def kind(value: Any) -> str:
    """The type of a value in a person's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def listed(columns: Mapping[str, Any]) -> str:
    """The names of columns, the first of them."""
    names = [str(name) for name in columns]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no fields"


def _message(turn: Any, number: int, role: str, content: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise Rejected("wrong_type", f"message {number} is {kind(turn)}, not an object with {role!r} and {content!r}")
    if not isinstance(turn.get(role), str):
        hint = "; rows with from and value are of format sharegpt" if role == "role" and "from" in turn else ""
        raise Rejected("missing_field", f"message {number} has no {role!r}; it has {listed(turn)}{hint}")
    if turn[role] not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise Rejected(
            "bad_role", f"message {number}: unknown role {turn[role]!r}; known: {known}{_role_hint(turn[role])}"
        )
    # Templates want a missing key, not a null.
    rest = {
        key: without_nulls(value) for key, value in turn.items() if value is not None and key not in (role, content)
    }
    marks = [rest.pop(key) for key in MARKS if isinstance(rest.get(key), bool) and turn[role] == "assistant"]
    if False in marks:
        rest["weight"] = 0
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], f"message {number}: 'tool_calls'")
        if not rest["tool_calls"]:  # servers write [] where there is none, and templates look for the key alone
            del rest["tool_calls"]
    text = _content(turn.get(content), number, content)
    if not text.strip() and not rest.get("tool_calls"):
        if turn[role] == "assistant":
            raise Rejected("empty_answer", f"message {number}: the assistant's {content!r} is empty")
        if content not in turn:
            raise Rejected("missing_field", f"message {number} has no {content!r}; it has {listed(turn)}")
    if rest.get("weight", 1) not in (0, 1):
        raise Rejected("wrong_type", f"message {number}: weight is {rest['weight']!r}; only 0 and 1 are known")
    return {**rest, "role": turn[role], "content": text}


def _role_hint(role: str) -> str:
    if role.lower() in ROLES:
        return f" (write {role.lower()!r})"
    if role in SHAREGPT_ROLES or role == CALL:
        return f"; {role!r} is a role of format sharegpt"
    return " ('function' is 'tool' now)" if role == "function" else ""


def _renamed(turn: Any, number: int, role: str, content: str) -> Any:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
        return turn
    if turn[role] == CALL:
        return {**turn, role: "assistant", content: None, "tool_calls": _calls(turn.get(content), number)}
    return {**turn, role: SHAREGPT_ROLES.get(turn[role], turn[role])}


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """The tool calls of a turn of role function_call: {name, arguments}, or a list of them."""
    what = f"message {number}: the value of a {CALL} is not JSON text of {{name, arguments}}"
    found = _parsed(value, what) if isinstance(value, str) else without_nulls(value)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Rejected("wrong_type", what)
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def _content(value: Any, number: int, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        if other := next((part["type"] for part in value if part.get("type") not in TEXTS), None):
            raise Rejected("wrong_type", f"message {number}: {name!r} has a part of type {other!r}, which is not text")
        return "".join(part["text"] for part in value)
    raise Rejected("wrong_type", f"message {number}: {name!r} is {kind(value)}, not text")


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
    """The values, if they are a list of objects; raises Rejected."""
    if not isinstance(values, list):
        raise Rejected("wrong_type", f"{what} is {kind(values)}, not a list of objects")
    for value in values:
        if not isinstance(value, dict):
            raise Rejected("wrong_type", f"{what} has {kind(value)} in it, not only objects")
    return values


def without_nulls(value: Any) -> Any:
    """The value without the keys, at any depth, whose value is null; entries of lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _parsed(text: str, otherwise: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Rejected("wrong_type", otherwise) from None


@dataclass(frozen=True)
class Row:
    """The columns of a raw row, under the names that the format uses."""

    columns: Mapping[str, Any]
    fields: Mapping[str, str]
    as_chat: bool = False
    """Whether prompt and completion are turns of a chat (see tokenize.py: form_line)."""

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
    """Read a raw row in `format`; raises Rejected, which the row may be.

    `as_chat` makes a chat of a prompt and its completion.
    """
    if isinstance(columns, Rejected):
        raise columns
    if not isinstance(columns, Mapping):
        raise Rejected("not_an_object", f"expected an object with fields, found {kind(columns)}")
    try:
        return FORMATS[format](Row(columns, fields, as_chat))
    except RecursionError:
        raise Rejected("wrong_type", "nested too deeply") from None


def check_fields(format: str, fields: Mapping[str, str], where: str) -> None:
    """Raise UserError if `fields` maps a name that the format does not have; `where` names the setting."""
    known = FIELDS.get(format) or tuple(dict.fromkeys(itertools.chain(*FIELDS.values())))
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


# The format and the fields of rows whose source sets none, by the names of their columns and by what becomes of them.


OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "input": ("context", "article", "passage"),
    "system": ("system_prompt",),
    "prompt": ("question", "query", "instruction", "input", "problem", "user"),
    "completion": ("answer", "response", "output", "target", "solution", "label", "chosen", "assistant", "generation"),
    "instruction": ("prompt", "question", "query", "problem", "user"),
    "output": ("answer", "response", "completion", "target", "solution", "label", "chosen", "assistant", "generation"),
    "messages": ("conversation", "conversations", "chat", "dialogue", "dialog", "turns"),
    "conversations": ("conversation", "messages", "chat", "dialogue", "dialog", "turns"),
    "from": ("role", "speaker"),
    "value": ("content", "text"),
    "text": ("content", "document", "body", "article", "passage"),
}
"""What corpora call the fields of our formats."""
INSIDE = ("from", "value")  # keys of a turn, and no columns
ADDED = {"input", "system", "history", "tools", *OTHER_NAMES["input"], *OTHER_NAMES["system"]}
"""Columns that belong to a question or a chat."""
OTHER_TASKS = {"chosen", "rejected", "label", "labels", "kto_tag", "choices", "options", "image", "images", "audios"}
"""Columns of preferences, classes, tests and pictures: their rows are more than questions with answers."""
NO_DOCUMENTS = {*OTHER_NAMES["completion"], *OTHER_TASKS, "summary", "highlights", "role", "parent_id"}
"""Columns beside which a text is an example of a class, or a message of a tree."""
KNOWN = {*ADDED, *OTHER_TASKS, *OTHER_NAMES, *itertools.chain(*OTHER_NAMES.values())} - {*INSIDE}


@dataclass(frozen=True)
class Reading:
    """A way to read some rows."""

    format: str
    fields: dict[str, str]
    """As a source sets them."""
    columns: tuple[str, ...]
    """Those of the fields that its format needs."""
    examples: tuple[Example | None, ...]
    """What the rows are; None: cannot be used."""
    rank: tuple[int, ...]
    """The lower, the better: how sure its names are, known columns left out, fields that it sets, its format."""
    lost: tuple[str, ...]
    """Columns that it leaves out though they matter."""

    @property
    def used(self) -> int:
        """Rows that it can use."""
        return len(self.examples) - self.examples.count(None)

    def settings(self) -> str:
        """As `format: alpaca, fields: {output: answer}`."""
        shown = ", ".join(f"{field}: {column}" for field, column in self.fields.items())
        return f"format: {self.format}" + f", fields: {{{shown}}}" * bool(shown)


def find(rows: Sequence[Any], given: Mapping[str, str], chat: object = "auto") -> Reading | None:
    """Find the way in which rows are meant; None if no format can use any of them.

    `given` are the fields, and `chat` the choice, that their source sets. Raises UserError if two ways are as good, or
    the best one leaves out what matters.
    """
    rows = [row for row in rows if isinstance(row, Mapping)]
    found = [
        _reading(format, fields, rows, given)
        for format in NEEDED
        if given.keys() <= set(FIELDS[format]) and (format == "prompt_completion" or chat is not (format == "text"))
        for fields in _assignments(format, rows, given)
    ]
    # Of rows of two kinds those that are far fewer do not decide.
    most = max((reading.used for reading in found if reading), default=0)
    readings = sorted((one for one in found if one and 2 * one.used > most), key=lambda one: one.rank)
    if not readings:
        return None
    best = readings[0]
    rivals = [one for one in readings if one.rank[:2] == best.rank[:2] and set(one.columns) != set(best.columns)]
    # Messages in a column of that name have always been read so, whatever stands beside them.
    plain = next((one for one in readings if one.rank[0] == 0 and one.format == "messages"), best)
    if plain is not best:
        best, rivals = plain, [best] * (best.examples != plain.examples)
    if rivals:
        raise UserError(f"the rows can be read in two ways; set {best.settings()}, or {rivals[0].settings()}")
    if best.lost:
        lost = ", ".join(best.lost)
        raise UserError(f"the rows have {lost}; to train on them without that, set {best.settings()}")
    return best


def why_not(row: Any, given: Mapping[str, str]) -> Rejected:
    """Why no format can use a row."""
    try:
        if not isinstance(row, Mapping):
            to_example("text", row, {})
        for format in NEEDED:
            for fields in _assignments(format, [row], given):
                to_example(format, row, fields, as_chat=True)
    except Rejected as why:
        return why
    return Rejected("missing_field", f"its columns, {listed(row)}, are those of no format; set format and fields")


def _assignments(format: str, rows: Sequence[Mapping[Any, Any]], given: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Each way to take columns of rows for the fields of a format, by their names."""

    def called(field: str, columns: Iterable[Any]) -> list[str]:
        there = {str(column).lower().strip(): str(column) for column in columns} | {name: name for name in columns}
        names = (field, *OTHER_NAMES.get(field, ()))
        return [given[field]] if field in given else [there[name] for name in names if name in there]

    columns = list(itertools.chain(*rows))
    for needed in itertools.product(*(called(field, columns) for field in NEEDED[format])):
        fields = dict(zip(NEEDED[format], needed, strict=True))
        for field in FIELDS[format]:
            free = called(field, _keys(rows, needed[0]) if field in INSIDE else set(columns) - set(fields.values()))
            if free:
                fields.setdefault(field, free[0])
        if len(set(needed)) == len(needed):
            yield fields


def _keys(rows: Iterable[Mapping[Any, Any]], column: str) -> Iterable[Any]:
    """The keys of the first turn in a column."""
    for row in rows:
        with contextlib.suppress(Rejected):
            if (turns := sequence(row.get(column), column)) and isinstance(turns[0], Mapping):
                return turns[0]
    return ()


def _reading(
    format: str, fields: dict[str, str], rows: Sequence[Mapping[Any, Any]], given: Mapping[str, str]
) -> Reading | None:
    """The reading with these columns; None where they are no documents."""
    used = {column for field, column in fields.items() if field not in INSIDE}
    left = {str(name): str(name).lower().strip() for row in rows for name, value in row.items() if value not in EMPTY}
    left = {name: lower for name, lower in left.items() if name not in used}
    own = {field if field in given else fields[field].lower().strip() for field in NEEDED[format]}
    if format == "text" and left and (own != {"text"} or NO_DOCUMENTS.intersection(left.values())):
        return None
    verdicts = {name for name in ("label", "kto_tag") if any(isinstance(row.get(name), bool) for row in rows)}
    tier = 3 if format == "text" else 0 if own == {"messages"} else 2 - (own in map(set, NEEDED.values()))
    matters = (verdicts, ADDED | OTHER_TASKS, KNOWN, set[str]())[tier]
    called = {field: column for field, column in fields.items() if field != column} | dict(given)
    return Reading(
        format,
        called,
        tuple(fields[field] for field in NEEDED[format]),
        tuple(_example(format, row, called) for row in rows),
        (tier, len(KNOWN.intersection(left.values())), len(called), list(NEEDED).index(format)),
        tuple(name for name in left if left[name] in matters),
    )


def _example(format: str, row: Any, fields: Mapping[str, str]) -> Example | None:
    try:
        return to_example(format, row, fields, as_chat=True)
    except Rejected:
        return None
