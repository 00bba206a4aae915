"""The form of a chat that its template can write, and which chats it cannot."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from olora_ray.data import left_out, tool_calls
from olora_ray.data.example import Chat, Rejected


class ChatForm:
    """Of one template: what it is for chats with tools, or for those without."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str, tools: bool) -> None:
        """Raises UserError that names the model for a template that cannot be used."""
        self._name = name
        self._objects = tool_calls.wants_objects(source, special_tokens, name)
        self._null = tool_calls.wants_null(source, special_tokens, name)
        self._developer = left_out.developer_role(source, special_tokens, name)
        self._no_tools = tools and left_out.leaves_tools_out(source, special_tokens, name)

    def __call__(self, chat: Chat) -> Chat:
        """The chat in that form; raises Rejected where the template would leave a part of it out."""
        messages = list(chat.messages)
        if self._no_tools:
            raise Rejected(
                "template",
                f"the chat template of {self._name} leaves the tools out: take a base whose chat template writes them,"
                " or rows without tools",
            )
        if any(message["role"] == "developer" for message in messages):
            messages = self._from_developer(messages)
        if self._objects:
            messages = tool_calls.with_objects(messages)
        if self._null:
            messages = tool_calls.with_null(messages)
        return replace(chat, messages=tuple(messages))

    def _from_developer(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages of a developer, and perhaps of the system, under the role that the template writes."""
        if self._developer is None:
            raise Rejected(
                "template",
                f"the chat template of {self._name} leaves messages of the developer and of the system out: put their"
                " text into the user's first message, or take a base whose chat template writes them",
            )
        return left_out.as_system(messages) if self._developer == "system" else messages
