"""Format sharegpt: a chat as a list of turns with from and value; a tool call is a turn of its own."""

from collections.abc import Mapping
from typing import Any

from olora_ray.data.formats.chat import (
    CALL,
    SYSTEM,
    TURNS,
    after_system,
    parsed,
    sequence,
    to_chat,
    with_roles,
    without_nulls,
)
from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row


def read(row: Row) -> Example:
    role = row.column("from")
    content = row.column("value")
    given = with_roles(row, sequence(row.value("conversations"), "conversations"), role)
    # Entries that are no turns stay as they are, for `to_chat` to reject.
    turns = [_renamed(turn, number, role, content) for number, turn in enumerate(given, 1)]
    return to_chat(after_system(row, turns, role, content), row.optional("tools"), role, content)


def _renamed(turn: Any, number: int, role: str, content: str) -> Any:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
        return turn
    value = turn.get(content)
    if turn[role] != CALL:
        if isinstance(value, Mapping) and "content" in value:  # LangChain's {type, data: {content}}
            kept = {key: value[key] for key in ("tool_calls", "tool_call_id") if value.get(key)}
            return {**kept, role: turn[role], content: value["content"]}
        return turn
    problem = f"message {number}: the value of a {CALL} is not JSON text of {{name, arguments}}"
    if isinstance(value, str):
        calls = parsed(value, problem)
    else:
        calls = without_nulls(value)
    if not isinstance(calls, list):
        calls = [calls]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        raise Rejected("wrong_type", problem)
    calls = [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]
    return {**turn, role: "assistant", content: None, "tool_calls": calls}


FORMAT = Format(
    "sharegpt",
    read,
    makes="chat",
    fields=(
        Field("conversations", ("conversation", "messages", *TURNS), needed=True),
        Field("from", ("role", "speaker", "type"), in_turn=True),
        Field("value", ("content", "text", "parts", "message", "data"), in_turn=True),
        SYSTEM,
        Field("tools"),
    ),
    tools=True,
    rules=2,
)
