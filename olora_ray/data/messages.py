"""Messages of a row to a chat: roles, content, tool calls, tools.

Objects inside `tools` and messages lose their nulls: Arrow gives all rows of a file the union of their keys, so a null
in parquet says nothing, and the same rows as jsonl must give the same tokens. JSON text keeps its nulls everywhere.
"""

import json
from collections.abc import Mapping
from typing import Any

from olora_ray.data.example import Chat, Rejected

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
TEXTS = (None, "text", "input_text", "output_text")
"""Types of the parts of a content; pictures may have a `text` too, and reasoning is no part of an answer."""
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
