"""Chat templates: rendering as in transformers, without importing it, and the form of chats that a template takes.

A template is code from a model hub: it runs in jinja2's immutable sandbox. The form of chats that a template can
write is detected by rendering marked conversations, so that no part of a chat is lost silently.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olora_ray.common.errors import as_user_error
from olora_ray.data.formats.chat import REASONING
from olora_ray.data.formats.format import Chat, Rejected

Message = Mapping[str, Any]

# For base models without a chat template.
DEFAULT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# The value of data.chat_template that selects DEFAULT.
PLAIN = "plain"
# Without and with a begin token: the second is for tokenizers that put one before a text.
DEFAULTS = (DEFAULT, "{{ bos_token }}" + DEFAULT)

# Templates that print a date get this day, so that the tokens are the same every day. Llama 3's templates fall back to
# it.
TODAY = datetime(2024, 7, 26)


class ChatTemplate:
    """A compiled template with the special tokens that it may use."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        what: str = "model.name: the chat template",
    ) -> None:
        """Compile `source`; raise a UserError that begins with `what` if it is not valid."""
        # Exception: constant expressions are worked out here, and 1 / 0 is a ZeroDivisionError.
        with as_user_error(f"{what} is not valid", Exception):
            self._template = _compiled(source)
        self._known = {**self._template.globals, "documents": None, **special_tokens}

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the conversation as text; raise whatever the template raises, mostly a jinja2.TemplateError."""
        given = {
            **self._known,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        # `Template.render` copies the variables twice: a fifth of the time of a rendering.
        template = self._template
        return "".join(
            template.root_render_func(
                Context(template.environment, given, template.name, template.blocks)
            )
        )


class _Generation(jinja2.ext.Extension):
    """A jinja2 extension that accepts {% generation %} blocks and ignores them: tokenize.py locates answers itself."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        # Templates ask this for every message; the sandbox would take a tenth of the time of a chat to allow it.
        if type(obj) is LoopContext and attribute in ("first", "last", "index", "index0"):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    template = environment.from_string(source)
    # jinja2 keeps globals in a chain of two dicts and looks them up key by key: a third of the time of a rendering.
    template.globals = dict(template.globals)
    return template


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# The form of chats that a template can write, detected by rendering marked conversations.
#
# Rows have the arguments of tool calls as an object, or as JSON text, which is the form of OpenAI's API. Most templates
# write `arguments | tojson`, which would quote and escape a text, or loop over the keys of an object. Servers parse the
# text before they render. So a model that was trained on quoted text would see another form when it is served.


_MARK = "olora_marker"
EXCHANGE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
_FUNCTION = {
    "name": _MARK,
    "description": "A function.",
    "parameters": {
        "type": "object",
        "properties": {"x": {"type": "string", "description": "A text."}},
        "required": [],
    },
}


@dataclass(frozen=True)
class ChatForm:
    """The form in which one template takes chats."""

    what: str
    """The template, as messages name it."""
    arguments: Literal["objects", "text"] | None
    """The form of arguments in which the template writes tool calls; None if both forms give the same text, or neither
    works."""
    wants_null: bool
    """The template writes a tool call only if the content is null, not "" (DeepSeek's V3 and R1)."""
    wants_parts: bool
    """The template writes a content only as a list of parts (models that take images)."""
    developer: Literal["developer", "system"] | None
    """The role under which the template writes developer messages; None if it drops them under both roles."""
    writes_tools: bool

    def __call__(self, chat: Chat) -> Chat:
        """Return the chat in this form; raise Rejected if the template would drop a part of it."""
        messages = [_with_every_name(each) if len(each) > 2 else each for each in chat.messages]
        if chat.tools is not None and not self.writes_tools:
            raise Rejected(
                "template",
                f"{self.what} does not write the tools: set data.chat_template to one that does,"
                " or remove the rows with tools",
            )
        if "developer" in [message["role"] for message in messages]:
            if self.developer is None:
                raise Rejected(
                    "template",
                    f"{self.what} writes neither developer nor system messages: move their text"
                    " into the first user message, or set data.chat_template to one that writes them",
                )
            if self.developer == "system":
                messages = _with_one_system(messages)
        if self.arguments:
            messages = [
                {
                    **message,
                    "tool_calls": [self._with_arguments(call) for call in message["tool_calls"]],
                }
                if isinstance(message.get("tool_calls"), list)
                else message
                for message in messages
            ]
        if self.wants_null:
            messages = [
                {**message, "content": None} if _calls_alone(message) else message
                for message in messages
            ]
        if self.wants_parts:
            messages = [{**message, "content": _parts(message["content"])} for message in messages]
        return Chat(tuple(messages), chat.tools)

    def _with_arguments(self, call: Any) -> Any:
        # Only an object, or JSON text of an object, is converted; anything else stays unchanged.
        if not isinstance(call, Mapping):
            return call
        if "function" in call:
            return {**call, "function": self._with_arguments(call["function"])}
        value = call.get("arguments")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return call
            return (
                {**call, "arguments": value}
                if isinstance(value, dict) and self.arguments == "objects"
                else call
            )
        as_text = isinstance(value, dict) and self.arguments == "text"
        return {**call, "arguments": json.dumps(value, ensure_ascii=False)} if as_text else call


def chat_form(source: str, special_tokens: Mapping[str, str], what: str) -> ChatForm:
    """Return the form of chats for a template, which messages call `what`."""
    return _chat_form(source, tuple(sorted(special_tokens.items())), what)


@lru_cache(maxsize=8)
def _chat_form(source: str, special_tokens: tuple[tuple[str, str], ...], what: str) -> ChatForm:
    template = ChatTemplate(source, dict(special_tokens))
    # Arguments as JSON text and as an object, because some templates refuse one of them.
    shapes: tuple[Any, Any] = ("{}", {})
    empty, null = (
        any(_MARK in _with_call(template, each, text) for each in shapes) for text in ("", None)
    )
    wants_null = null and not empty and "tool_calls" in source
    example = {"olora_argument": 1}
    forms: tuple[Any, Any] = (example, json.dumps(example))
    from_object, from_text = (
        _with_call(template, each, None if wants_null else "") for each in forms
    )
    arguments: Literal["objects", "text"] | None = None
    if from_object != from_text:
        if "olora_argument" in from_object and str(example) not in from_object:
            arguments = "objects"
        elif "olora_argument" in from_text:
            arguments = "text"
    contents: tuple[Any, Any] = (_MARK, _parts(_MARK))
    as_text, as_parts = (
        _written(template, [{**EXCHANGE[0], "content": each}]) for each in contents
    )
    wants_parts = _MARK in as_parts and _MARK not in as_text
    return ChatForm(
        what, arguments, wants_null, wants_parts, _developer(template), _writes_tools(template)
    )


def _with_call(template: ChatTemplate, arguments: Any, content: str | None) -> str:
    call = {
        "id": "call00000",
        "type": "function",
        "function": {"name": _MARK, "arguments": arguments},
    }
    return _written(
        template, [EXCHANGE[0], {"role": "assistant", "content": content, "tool_calls": [call]}]
    )


def _written(template: ChatTemplate, messages: Sequence[Message]) -> str:
    # Text "" means that the template refuses the conversation.
    with suppress(Exception):  # a template is code: it may raise anything
        return template.render(messages)
    return ""


def _developer(template: ChatTemplate) -> Literal["developer", "system"] | None:
    roles: tuple[Literal["developer", "system"], ...] = ("developer", "system")
    for role in roles:
        texts = _exchanges(template, [{"role": role, "content": _MARK}])
        # A template that refuses a developer message keeps the role: its error then says why the row is rejected.
        if any(_MARK in text for text in texts) or (role == "developer" and not texts):
            return role
    return None


def _writes_tools(template: ChatTemplate) -> bool:
    # Some templates write tools only beside a system message, or only before the last user message.
    heads: tuple[list[Message], ...] = ([], [{"role": "system", "content": "Be brief."}])
    # In the form of OpenAI's API, and flat, because some templates read that.
    tools: tuple[Message, ...] = ({"type": "function", "function": _FUNCTION}, _FUNCTION)
    texts = [
        text for tool in tools for head in heads for text in _exchanges(template, head, [tool])
    ]
    return not texts or any(_MARK in text for text in texts)


def _exchanges(
    template: ChatTemplate, head: Sequence[Message], tools: Sequence[Message] | None = None
) -> list[str]:
    texts = []
    for count in (1, 2):
        with suppress(Exception):  # a template is code: it may raise anything
            texts.append(template.render([*head, *EXCHANGE[:count]], count == 1, tools))
    return texts


def _with_one_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # Some templates write no second system message, so all that precede the user's become one.
    heads = ("developer", "system")
    text = "\n\n".join(message["content"] for message in messages if message["role"] in heads)
    return [
        {"role": "system", "content": text},
        *(each for each in messages if each["role"] not in heads),
    ]


def _parts(content: str | None) -> Any:
    return content and [{"type": "text", "text": content}]


def reasoning(message: Mapping[str, Any]) -> Any:
    """Return a message's reasoning, from any of its keys or <think> tags in the content; None if it has none."""
    for name in REASONING:
        if message.get(name) is not None:
            return message[name]
    before, closed, _ = text_of(message).partition("</think>")
    return before.rpartition("<think>")[2] if closed else None


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return (content if isinstance(content, str) else content[-1]["text"]).strip()


def _with_every_name(message: dict[str, Any]) -> dict[str, Any]:
    # Templates read the reasoning under different names, so transformers gives it to them under each.
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return (
        message
        if thought is None
        else {**dict.fromkeys(REASONING, thought), **message, REASONING[0]: thought}
    )


def _calls_alone(message: Mapping[str, Any]) -> bool:
    return (
        message["role"] == "assistant"
        and bool(message.get("tool_calls"))
        and not message["content"].strip()
    )


def left_out(message: Mapping[str, Any], text: str) -> str | None:
    """Return a called function that `text`, the template's output for the message, lacks; None if all are there.

    A template may write a call in any way, but it writes the function's name once per call. The content may name the
    function too, so it is removed first.
    """
    own = text.replace(text_of(message), "", 1)
    names = Counter(name for call in message["tool_calls"] if (name := called(call)))
    return next((name for name, calls in names.items() if own.count(name) < calls), None)


def called(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name.strip() if isinstance(name, str) else ""
