"""Format messages: a chat as a list of messages with role and content, as the APIs of models take it.

The list may also have texts of the user and the assistant in turn, or pairs of both. A text is a chat in a markup.
"""

from dataclasses import replace

from olora_ray.data.formats.chat import SYSTEM, TURNS, after_system, in_turn, sequence, to_chat
from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row
from olora_ray.data.formats.markup import turns_in
from olora_ray.data.formats.text import TEXT


def read(row: Row) -> Example:
    value = row.value("messages")
    try:
        turns = sequence(value, "messages")
    except Rejected:
        turns = []
        if isinstance(value, str):
            turns = turns_in(value, row.markup)
        if not turns:
            raise
    turns = after_system(row, in_turn(turns), "role", "content")
    tools = row.optional("tools")
    if row.column("tools") == "functions" and isinstance(tools, list):
        tools = [{"type": "function", "function": function} for function in tools]
    return to_chat(turns, tools, roles=row.roles)


FORMAT = Format(
    "messages",
    read,
    makes="chat",
    fields=(
        Field(
            "messages",
            ("conversation", "conversations", *TURNS),
            (TEXT.name, *TEXT.other_names),
            needed=True,
        ),
        replace(SYSTEM, asked=True),
        Field("tools", ("functions",)),
    ),
    tools=True,
)
