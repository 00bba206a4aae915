"""Tool calls in the form that a chat template writes: arguments, the content beside them; and whether it wrote them.

Rows have them as an object, or as JSON text, which is the form of OpenAI's API. Most templates write
`arguments | tojson`, which of a text makes a quoted one with escaped quotes: servers parse texts before they render, so
a model that was trained on those would see another form when it is served. A few templates take texts as they are.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from olora_ray.data import template_trial
from olora_ray.data.chat_template import ChatTemplate

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
