"""Format messages: a chat as a list of messages with role and content, as the APIs of models take it."""

from dataclasses import replace

from olora_ray.data.formats.chat import SYSTEM, TURNS, after_system, sequence, to_chat
from olora_ray.data.formats.format import Example, Field, Format, Row


def read(row: Row) -> Example:
    turns = after_system(row, sequence(row.value("messages"), "messages"), "role", "content")
    return to_chat(turns, row.optional("tools"))


FORMAT = Format(
    "messages",
    read,
    makes="chat",
    fields=(
        Field("messages", ("conversation", "conversations", *TURNS), needed=True),
        replace(SYSTEM, asked=True),
        Field("tools"),
    ),
    tools=True,
)
