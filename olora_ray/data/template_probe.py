"""Tool calls in the form that a chat template writes: arguments, the content beside them; and whether it wrote them.

Rows have them as an object, or as JSON text, which is the form of OpenAI's API. Most templates write
`arguments | tojson`, which of a text makes a quoted one with escaped quotes: servers parse texts before they render, so
a model that was trained on those would see another form when it is served. A few templates take texts as they are.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from olora_ray.data import template_trial
from olora_ray.data.chat_template import ChatTemplate, Message
from olora_ray.data.formats import Chat, Rejected

_NAME = "olora_argument"
_WRITTEN = f'"{_NAME}":'
_FUNCTION = "olora_function"


def wants_objects(source: str, special_tokens: Mapping[str, str], name: str) -> bool:
    """Whether a template writes arguments as JSON if they are an object, but not if they are JSON text.

    Raises UserError that names the model for a template that cannot be used.
    """
    return "arguments" in source and _wants_objects(source, tuple(sorted(special_tokens.items())), name)


@lru_cache(maxsize=64)
def _wants_objects(source: str, special_tokens: tuple[tuple[str, str], ...], name: str) -> bool:
    template_trial.check(source, dict(special_tokens), name)
    template = ChatTemplate(source, dict(special_tokens), name)
    arguments = {_NAME: 1}
    content = None if wants_null(source, dict(special_tokens), name) else ""
    as_object, as_text = (_rendered(template, each, content) for each in (arguments, json.dumps(arguments)))
    return _WRITTEN in as_object and _WRITTEN not in as_text


def wants_null(source: str, special_tokens: Mapping[str, str], name: str) -> bool:
    """Whether a template writes a tool call only where the content beside it is null, not "" (DeepSeek's V3 and R1).

    Raises UserError that names the model for a template that cannot be used.
    """
    return "tool_calls" in source and _wants_null(source, tuple(sorted(special_tokens.items())), name)


@lru_cache(maxsize=64)
def _wants_null(source: str, special_tokens: tuple[tuple[str, str], ...], name: str) -> bool:
    template_trial.check(source, dict(special_tokens), name)
    template = ChatTemplate(source, dict(special_tokens), name)
    # As JSON text and as an object: some templates refuse one of them.
    forms: tuple[Any, Any] = ("{}", {})
    empty, null = (any(_FUNCTION in _rendered(template, each, content) for each in forms) for content in ("", None))
    return null and not empty


def _rendered(template: ChatTemplate, arguments: Any, content: str | None) -> str:
    """A conversation with a tool call; "" where the template refuses it."""
    call = {"id": "call00000", "type": "function", "function": {"name": _FUNCTION, "arguments": arguments}}
    question = {"role": "user", "content": "Hello"}
    try:
        return template.render([question, {"role": "assistant", "content": content, "tool_calls": [call]}])
    except Exception:  # a template is code: it may raise anything
        return ""


def with_objects(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of their tool calls as objects, where they are JSON text of one."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    try:
        found = json.loads(call["arguments"]) if isinstance(call.get("arguments"), str) else None
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": found} if isinstance(found, dict) else call


def with_null(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with null for the content of those that have tool calls and no text."""
    return [{**message, "content": None} if _calls_alone(message) else message for message in messages]


def _calls_alone(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls")) and not message["content"].strip()


def left_out(message: Mapping[str, Any], text: str) -> str | None:
    """The function of a tool call that does not stand in `text`, which a template made of the message; None if all do.

    A template may write a call in any way, but writes the function's name: once for each call, beside the content,
    which may name the function, too.
    """
    own = text.replace((message.get("content") or "").strip(), "", 1)
    names = Counter(name for call in message["tool_calls"] if (name := _function(call)))
    return next((name for name, calls in names.items() if own.count(name) < calls), None)


def _function(call: Any) -> str:
    """The name of the function that is called; "" where the call has none."""
    found = call.get("function", call) if isinstance(call, Mapping) else None
    name = found.get("name") if isinstance(found, Mapping) else None
    return name.strip() if isinstance(name, str) else ""


# What a chat template leaves out of a conversation, found by rendering marked ones.


Role = Literal["developer", "system"]
HEADS = ("developer", "system")
"""Roles of the messages before the user's first."""
_MARK = "olora_marker"
_PROBE = {
    "name": _MARK,
    "description": "A function.",
    "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "A text."}}, "required": []},
}
_TOOLS = ({"type": "function", "function": _PROBE}, _PROBE)
"""As OpenAI's API has them, and flat, as some templates read them."""


def developer_role(source: str, special_tokens: Mapping[str, str], name: str) -> Role | None:
    """The role under which a template writes the developer's messages; None if it leaves them out under both.

    One that refuses them keeps their role: it says why. Raises UserError that names the model for a template that
    cannot be used.
    """
    return _developer_role(source, tuple(sorted(special_tokens.items())), name)


@lru_cache(maxsize=64)
def _developer_role(source: str, special_tokens: tuple[tuple[str, str], ...], name: str) -> Role | None:
    template = _tried(source, special_tokens, name)
    texts = _rendered_probe(template, [{"role": "developer", "content": _MARK}])
    if not texts or _marked(texts):
        return "developer"
    return "system" if _marked(_rendered_probe(template, [{"role": "system", "content": _MARK}])) else None


def leaves_tools_out(source: str, special_tokens: Mapping[str, str], name: str) -> bool:
    """Whether a template writes nothing of the tools of a conversation.

    Raises UserError that names the model for a template that cannot be used.
    """
    return "tools" not in source or _leaves_tools_out(source, tuple(sorted(special_tokens.items())), name)


@lru_cache(maxsize=64)
def _leaves_tools_out(source: str, special_tokens: tuple[tuple[str, str], ...], name: str) -> bool:
    template = _tried(source, special_tokens, name)
    # Some templates write them only with a system message, or only before the user's last one.
    heads: tuple[list[Message], ...] = ([], [{"role": "system", "content": "Be brief."}])
    texts = [text for tool in _TOOLS for head in heads for text in _rendered_probe(template, head, [tool])]
    return bool(texts) and not _marked(texts)


def as_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one of the system for all that stand before the user's: some templates write no second."""
    text = "\n\n".join(message["content"] for message in messages if message["role"] in HEADS)
    return [{"role": "system", "content": text}, *(each for each in messages if each["role"] not in HEADS)]


def _tried(source: str, special_tokens: Iterable[tuple[str, str]], name: str) -> ChatTemplate:
    template_trial.check(source, dict(special_tokens), name)
    return ChatTemplate(source, dict(special_tokens), name)


def _rendered_probe(
    template: ChatTemplate, head: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[str]:
    """What a template makes of a question, and of one with its answer, after `head`; nothing where it refuses."""
    found = []
    for count in (1, 2):
        with suppress(Exception):  # a template is code: it may raise anything
            found.append(template.render([*head, *template_trial.MESSAGES[:count]], count == 1, tools))
    return found


def _marked(texts: Iterable[str]) -> bool:
    return any(_MARK in text for text in texts)


# The form of a chat that its template can write, and which chats it cannot.


class ChatForm:
    """Of one template: what it is for chats with tools, or for those without."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str, tools: bool) -> None:
        """Raises UserError that names the model for a template that cannot be used."""
        self._name = name
        self._objects = wants_objects(source, special_tokens, name)
        self._null = wants_null(source, special_tokens, name)
        self._developer = developer_role(source, special_tokens, name)
        self._no_tools = tools and leaves_tools_out(source, special_tokens, name)

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
            messages = with_objects(messages)
        if self._null:
            messages = with_null(messages)
        return replace(chat, messages=tuple(messages))

    def _from_developer(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages of a developer, and perhaps of the system, under the role that the template writes."""
        if self._developer is None:
            raise Rejected(
                "template",
                f"the chat template of {self._name} leaves messages of the developer and of the system out: put their"
                " text into the user's first message, or take a base whose chat template writes them",
            )
        return as_system(messages) if self._developer == "system" else messages
