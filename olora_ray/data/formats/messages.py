"""Format messages: a chat as a list of messages with role and content, as the APIs of models take it."""

from dataclasses import replace

from olora_ray.data.formats.chat import (
    SYSTEM,
    TURNS,
    after_system,
    sequence,
    to_chat,
    with_roles,
)
from olora_ray.data.formats.format import Example, Field, Format, Row
from olora_ray.data.formats.markup import turns_in


def read(row: Row) -> Example:
    if row.markup == "none":
        turns = sequence(row.value("messages"), "messages")
    else:
        turns = turns_in(row.text("messages"), row.markup)
    turns = after_system(row, with_roles(row, turns, "role"), "role", "content")
    if row.markup == "glaive" and turns[0]["role"] == "system":
        turns[0]["content"] = turns[0]["content"].removeprefix("SYSTEM:").lstrip()
    tools = row.optional("tools")
    if row.column("tools") == "functions" and isinstance(tools, list):
        tools = [{"type": "function", "function": function} for function in tools]
    return to_chat(turns, tools)


FORMAT = Format(
    "messages",
    read,
    makes="chat",
    fields=(
        Field("messages", ("conversation", "conversations", *TURNS), needed=True),
        replace(SYSTEM, asked=True),
        Field("tools", ("functions",)),
    ),
    tools=True,
)
