"""What a chat template leaves out of a conversation, found by rendering marked ones.

A template writes the parts that it knows and passes over the rest without a word: many know no role `developer`, and
most of those of models that call no functions know no tools. A model would be trained on answers to what it was not
shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

from olora_ray.data import template_trial
from olora_ray.data.chat_template import ChatTemplate, Message

Role = Literal["developer", "system"]
HEADS = ("developer", "system")
"""Roles of the messages before the user's first."""
_MARK = "olora_marker"
_FUNCTION = {
    "name": _MARK,
    "description": "A function.",
    "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "A text."}}, "required": []},
}
_TOOLS = ({"type": "function", "function": _FUNCTION}, _FUNCTION)
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
    texts = _rendered(template, [{"role": "developer", "content": _MARK}])
    if not texts or _marked(texts):
        return "developer"
    return "system" if _marked(_rendered(template, [{"role": "system", "content": _MARK}])) else None


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
    texts = [text for tool in _TOOLS for head in heads for text in _rendered(template, head, [tool])]
    return bool(texts) and not _marked(texts)


def as_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one of the system for all that stand before the user's: some templates write no second."""
    text = "\n\n".join(message["content"] for message in messages if message["role"] in HEADS)
    return [{"role": "system", "content": text}, *(each for each in messages if each["role"] not in HEADS)]


def _tried(source: str, special_tokens: Iterable[tuple[str, str]], name: str) -> ChatTemplate:
    template_trial.check(source, dict(special_tokens), name)
    return ChatTemplate(source, dict(special_tokens), name)


def _rendered(
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
