"""Chat templates: rendered as transformers renders them, without importing transformers, and tried before that.

A template is code from a model hub: it runs in jinja2's immutable sandbox. What a template does to a chat is found by
rendering marked conversations, so that rows never lose a part of their chat in silence.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olora_ray.common.errors import UserError, first_line
from olora_ray.data.formats import REASONING, Chat, Rejected

Message = Mapping[str, Any]

DEFAULT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For base models that have no template of their own."""

PLAIN = "plain"
"""Its name in data.chat_template."""
DEFAULTS = (DEFAULT, "{{ bos_token }}" + DEFAULT)
"""Without and with a begin token: the second is for tokenizers that put one before a text."""

TODAY = datetime(2024, 7, 26)
"""What templates that print a date get: the same tokens every day. (Llama 3's templates fall back to this day.)"""


class ChatTemplate:
    """A compiled template with the special tokens that it may use."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], what: str = "model.name: the chat template"
    ) -> None:
        """Compile `source`; raises UserError that begins with `what` if it is not valid."""
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _compiled(source)
        except MemoryError:
            raise
        except Exception as error:  # constant expressions are worked out here: 1 / 0 is a ZeroDivisionError
            raise UserError(f"{what} is not valid: {first_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text; raises whatever the template does, mostly a jinja2.TemplateError."""
        return self._template.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )


class _Generation(jinja2.ext.Extension):
    """Lets {% generation %} blocks parse; they mean nothing here (see tokenize.py)."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    template = environment.from_string(source)
    # A chain of two, which would be gone through key by key for each rendering: a third of its time.
    template.globals = dict(template.globals)
    return template


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# The check of a template in a process of its own, where its time and memory have a limit. The sandbox has none:
# `{{ 10 ** 10 ** 9 }}` and nested loops run for ever, and operators, filters and methods of texts would each need a
# limit of their own. A template that waits for a certain message to misbehave is not found.


SECONDS = 2
"""Processor time that two short messages may take; a template takes some milliseconds."""
MEMORY = 2**30
EXCHANGE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})


@lru_cache(maxsize=8)
def refuse_hostile(sources: frozenset[str], special_tokens: frozenset[tuple[str, str]], what: str) -> None:
    """Raise UserError if two short messages take too much time or memory, or an endless recursion, with a template."""
    # The child imports what this process imports, and not (-P) whatever lies in the current folder.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)])
    asked = {"sources": sorted(sources), "special_tokens": dict(special_tokens)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=json.dumps(asked).encode(),
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            timeout=120,  # however busy the machine is
            check=False,
        )
    except subprocess.TimeoutExpired:
        verdict = -1
    else:
        verdict = done.returncode
    if verdict < 0 or verdict == _TOO_MUCH:
        raise UserError(
            f"{what} takes more than {SECONDS} s or {MEMORY // 2**30} GiB for two short messages, or calls itself"
            " without end, so it is not used: name another one in data.chat_template"
        )
    if verdict:
        raise RuntimeError(f"the check of a chat template cannot run: {done.stderr.decode(errors='replace')[-1000:]}")


_TOO_MUCH = 3


def _render_within_limits(sources: Sequence[str], special_tokens: Mapping[str, str]) -> int:
    """Exit code of the child. A template that raises is judged where its error can be shown."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS * len(sources), SECONDS * len(sources) + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for source in sources:
        try:
            template = ChatTemplate(source, special_tokens)
            rendered = [template.render(EXCHANGE[:count], count == 1) for count in (1, 2)]
        except (MemoryError, RecursionError):
            return _TOO_MUCH
        except Exception:  # noqa: S112
            continue
        if sum(map(len, rendered)) > 2**20:
            return _TOO_MUCH
    return 0


# What a template does to a chat, found by rendering marked conversations, and the chat in the form that it can write.
#
# Rows have arguments of tool calls as an object, or as JSON text, which is the form of OpenAI's API. Most templates
# write `arguments | tojson`, which of a text makes a quoted one with escaped quotes, or go through an object's keys.
# Servers parse texts before they render, so a model that was trained on those would see another form when it is served.


_MARK = "olora_marker"
_FUNCTION = {
    "name": _MARK,
    "description": "A function.",
    "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "A text."}}, "required": []},
}


@dataclass(frozen=True)
class ChatForm:
    """The form of chats for one template."""

    what: str
    """The template, in messages."""
    arguments: Literal["objects", "text"] | None
    """What it writes tool calls from: arguments as objects, or as JSON text; None if from both the same, or neither."""
    wants_null: bool
    """True if it writes a tool call only beside content that is null, not "" (DeepSeek's V3 and R1)."""
    wants_parts: bool
    """True if it writes a content only as a list of parts (templates of models that see)."""
    developer: Literal["developer", "system"] | None
    """The role under which it writes the developer's messages; None if it leaves them out under both."""
    writes_tools: bool
    """False if it writes nothing of the tools of a conversation."""

    def __call__(self, chat: Chat) -> Chat:
        """The chat in that form; raises Rejected where the template would leave a part of it out."""
        messages = [_with_every_name(message) for message in chat.messages]
        if chat.tools is not None and not self.writes_tools:
            raise Rejected(
                "template",
                f"{self.what} leaves the tools out: name one that writes them in"
                " data.chat_template, or take rows without tools",
            )
        if any(message["role"] == "developer" for message in messages):
            if self.developer is None:
                raise Rejected(
                    "template",
                    f"{self.what} leaves messages of the developer and of the system out: put"
                    " their text into the user's first message, or name a template that writes them in"
                    " data.chat_template",
                )
            if self.developer == "system":
                messages = _with_one_system(messages)
        if self.arguments:
            messages = [
                {**message, "tool_calls": [self._with_arguments(call) for call in message["tool_calls"]]}
                if isinstance(message.get("tool_calls"), list)
                else message
                for message in messages
            ]
        if self.wants_null:
            messages = [{**message, "content": None} if _calls_alone(message) else message for message in messages]
        if self.wants_parts:
            messages = [{**message, "content": _parts(message["content"])} for message in messages]
        return replace(chat, messages=tuple(messages))

    def _with_arguments(self, call: Any) -> Any:
        """A tool call with its arguments as the template wants them, where they are an object, or JSON text of one."""
        if not isinstance(call, Mapping):
            return call
        if "function" in call:
            return {**call, "function": self._with_arguments(call["function"])}
        found = call.get("arguments")
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError):
                return call
            return {**call, "arguments": found} if isinstance(found, dict) and self.arguments == "objects" else call
        as_text = isinstance(found, dict) and self.arguments == "text"
        return {**call, "arguments": json.dumps(found, ensure_ascii=False)} if as_text else call


def chat_form(source: str, special_tokens: Mapping[str, str], what: str) -> ChatForm:
    """The form of chats for a template; `what` names it in messages."""
    return _chat_form(source, tuple(sorted(special_tokens.items())), what)


@lru_cache(maxsize=8)
def _chat_form(source: str, special_tokens: tuple[tuple[str, str], ...], what: str) -> ChatForm:
    template = ChatTemplate(source, dict(special_tokens))
    # A call as JSON text and as an object: some templates refuse one of them.
    shapes: tuple[Any, Any] = ("{}", {})
    empty, null = (any(_MARK in _with_call(template, each, text) for each in shapes) for text in ("", None))
    wants_null = null and not empty and "tool_calls" in source
    given = {"olora_argument": 1}
    forms: tuple[Any, Any] = (given, json.dumps(given))
    from_object, from_text = (_with_call(template, each, None if wants_null else "") for each in forms)
    arguments: Literal["objects", "text"] | None = None
    if from_object != from_text:
        if "olora_argument" in from_object and str(given) not in from_object:
            arguments = "objects"
        elif "olora_argument" in from_text:
            arguments = "text"
    contents: tuple[Any, Any] = (_MARK, _parts(_MARK))
    as_text, as_parts = (_written(template, [{**EXCHANGE[0], "content": each}]) for each in contents)
    wants_parts = _MARK in as_parts and _MARK not in as_text
    return ChatForm(what, arguments, wants_null, wants_parts, _developer(template), _writes_tools(template))


def _with_call(template: ChatTemplate, arguments: Any, content: str | None) -> str:
    call = {"id": "call00000", "type": "function", "function": {"name": _MARK, "arguments": arguments}}
    return _written(template, [EXCHANGE[0], {"role": "assistant", "content": content, "tool_calls": [call]}])


def _written(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """A conversation as text; "" where the template refuses it."""
    with suppress(Exception):  # a template is code: it may raise anything
        return template.render(messages)
    return ""


def _developer(template: ChatTemplate) -> Literal["developer", "system"] | None:
    roles: tuple[Literal["developer", "system"], ...] = ("developer", "system")
    for role in roles:
        texts = _exchanges(template, [{"role": role, "content": _MARK}])
        # A template that refuses a developer keeps the role: it says why when it meets one.
        if any(_MARK in text for text in texts) or (role == "developer" and not texts):
            return role
    return None


def _writes_tools(template: ChatTemplate) -> bool:
    # Some templates write them only with a system message, or only before the user's last one.
    heads: tuple[list[Message], ...] = ([], [{"role": "system", "content": "Be brief."}])
    # As OpenAI's API has them, and flat, as some templates read them.
    tools: tuple[Message, ...] = ({"type": "function", "function": _FUNCTION}, _FUNCTION)
    texts = [text for tool in tools for head in heads for text in _exchanges(template, head, [tool])]
    return not texts or any(_MARK in text for text in texts)


def _exchanges(template: ChatTemplate, head: Sequence[Message], tools: Sequence[Message] | None = None) -> list[str]:
    """What a template makes of a question, and of one with its answer, after `head`; nothing where it refuses."""
    found = []
    for count in (1, 2):
        with suppress(Exception):  # a template is code: it may raise anything
            found.append(template.render([*head, *EXCHANGE[:count]], count == 1, tools))
    return found


def _with_one_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one of the system for all that stand before the user's: some templates write no second."""
    heads = ("developer", "system")
    text = "\n\n".join(message["content"] for message in messages if message["role"] in heads)
    return [{"role": "system", "content": text}, *(each for each in messages if each["role"] not in heads)]


def _parts(content: str | None) -> Any:
    return content and [{"type": "text", "text": content}]


def reasoning(message: Mapping[str, Any]) -> Any:
    """The reasoning of a message, under whatever name or within its content; None if it has none."""
    if (found := next((message[name] for name in REASONING if message.get(name) is not None), None)) is not None:
        return found
    before, closed, _ = text_of(message).partition("</think>")
    return before.rpartition("<think>")[2] if closed else None


def text_of(message: Mapping[str, Any]) -> str:
    """The content of a message, in whatever form, without the blanks around it."""
    content = message.get("content") or ""
    return (content if isinstance(content, str) else content[0]["text"]).strip()


def _with_every_name(message: dict[str, Any]) -> dict[str, Any]:
    """The message as transformers gives it to templates: its reasoning under the names that they read."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _calls_alone(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls")) and not message["content"].strip()


def left_out(message: Mapping[str, Any], text: str) -> str | None:
    """The function of a tool call that does not stand in `text`, which a template made of the message; None if all do.

    A template may write a call in any way, but writes the function's name: once for each call, beside the content,
    which may name the function, too.
    """
    own = text.replace(text_of(message), "", 1)
    names = Counter(name for call in message["tool_calls"] if (name := _called(call)))
    return next((name for name, calls in names.items() if own.count(name) < calls), None)


def _called(call: Any) -> str:
    """The name of the function that is called; "" where the call has none."""
    found = call.get("function", call) if isinstance(call, Mapping) else None
    name = found.get("name") if isinstance(found, Mapping) else None
    return name.strip() if isinstance(name, str) else ""


if __name__ == "__main__":
    sys.exit(_render_within_limits(**json.load(sys.stdin)))
