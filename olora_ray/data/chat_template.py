"""Chat templates: rendering as in transformers, without importing it, and the form of chats that a template takes.

A template is code from a model hub: it runs in jinja2's immutable sandbox. The form of chats that a template can
write is detected by rendering marked conversations, so that no part of a chat is lost silently.
"""

import itertools
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
from olora_ray.data.formats.chat import REASONING, SYSTEMS
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
        messages = [_with_every_name(message) for message in chat.messages]
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
                # Some templates write no second system message, so all that precede the user's become one.
                heads = list(itertools.takewhile(lambda each: each["role"] in SYSTEMS, messages))
                rest = messages[len(heads) :]
                messages = []
                if heads:
                    texts = [each["content"] for each in heads]
                    messages.append({"role": "system", "content": "\n\n".join(texts)})
                for message in rest:
                    if message["role"] == "developer":
                        message = {**message, "role": "system"}
                    messages.append(message)
        written = []
        for message in messages:
            calls = message.get("tool_calls")
            if self.arguments and isinstance(calls, list):
                message = {**message, "tool_calls": [self._with_arguments(call) for call in calls]}
            content = message["content"]
            if self.wants_null and calls and not content.strip() and message["role"] == "assistant":
                message = {**message, "content": None}
            elif self.wants_parts:
                message = {**message, "content": _parts(content)}
            written.append(message)
        return Chat(tuple(written), chat.tools)

    def _with_arguments(self, call: Any) -> Any:
        # Only an object, or JSON text of an object, is converted; anything else stays unchanged.
        if not isinstance(call, Mapping):
            return call
        if "function" in call:
            return {**call, "function": self._with_arguments(call["function"])}
        value = call.get("arguments")
        if self.arguments == "text" and isinstance(value, dict):
            return {**call, "arguments": json.dumps(value, ensure_ascii=False)}
        if self.arguments == "objects" and isinstance(value, str):
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
            if isinstance(value, dict):
                return {**call, "arguments": value}
        return call


@lru_cache(maxsize=8)
def chat_form(source: str, special_tokens: tuple[tuple[str, str], ...], what: str) -> ChatForm:
    """Return the form of chats for a template, which messages call `what`."""
    template = ChatTemplate(source, dict(special_tokens))

    def writes_call(content: str | None) -> bool:
        # Arguments as JSON text and as an object, because some templates refuse one of them.
        texts = [_with_call(template, "{}", content), _with_call(template, {}, content)]
        return any(_MARK in text for text in texts)

    wants_null = "tool_calls" in source and not writes_call("") and writes_call(None)
    content = None if wants_null else ""
    example = {"olora_argument": 1}
    from_object = _with_call(template, example, content)
    from_text = _with_call(template, json.dumps(example), content)
    arguments: Literal["objects", "text"] | None = None
    if from_object != from_text:
        if "olora_argument" in from_object and str(example) not in from_object:
            arguments = "objects"
        elif "olora_argument" in from_text:
            arguments = "text"
    as_text = _written(template, [{"role": "user", "content": _MARK}])
    as_parts = _written(template, [{"role": "user", "content": _parts(_MARK)}])
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
    texts = []
    for tool, head in itertools.product(tools, heads):
        texts += _exchanges(template, head, [tool])
    return not texts or any(_MARK in text for text in texts)


def _exchanges(
    template: ChatTemplate, head: Sequence[Message], tools: Sequence[Message] | None = None
) -> list[str]:
    texts = []
    for count in (1, 2):
        with suppress(Exception):  # a template is code: it may raise anything
            texts.append(template.render([*head, *EXCHANGE[:count]], count == 1, tools))
    return texts


def _parts(content: str | None) -> Any:
    return content and [{"type": "text", "text": content}]


def reasoning(message: Mapping[str, Any]) -> Any:
    """Return a message's reasoning, from any of its keys or <think> tags in the content; None if it has none."""
    for name in REASONING:
        if message.get(name) is not None:
            return message[name]
    before, closed, _ = text_of(message).partition("</think>")
    if not closed:
        return None
    return before.rpartition("<think>")[2]


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = content[-1]["text"]
    text: str = content.strip()
    return text


def _with_every_name(message: dict[str, Any]) -> dict[str, Any]:
    # Templates read the reasoning under different names, so transformers gives it to them under each.
    for name in REASONING:
        thought = message.get(name)
        if thought is not None:
            return {**dict.fromkeys(REASONING, thought), **message, REASONING[0]: thought}
    return message


def left_out(message: Mapping[str, Any], text: str) -> str | None:
    """Return a called function that `text`, the template's output for the message, lacks; None if all are there.

    A template may write a call in any way, but it writes the function's name once per call. The content may name the
    function too, so it is removed first.
    """
    own = text.replace(text_of(message), "", 1)
    for name, calls in Counter(map(called, message["tool_calls"])).items():
        if name and own.count(name) < calls:
            return name
    return None


def called(call: Any) -> str:
    if isinstance(call, Mapping) and "function" in call:
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return ""
    name: str = call["name"].strip()
    return name
