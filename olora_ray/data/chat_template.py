"""Chat templates, rendered as transformers renders them, without importing transformers.

A template is code from a model hub: it runs in jinja2's immutable sandbox, which has no limit of time or memory;
template_trial.py has.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olora_ray.common.errors import UserError, first_line

Message = Mapping[str, Any]

DEFAULT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For base models that have no template of their own."""

DEFAULTS = (DEFAULT, "{{ bos_token }}" + DEFAULT)
"""Without and with a begin token."""


def default(begin: bool) -> str:
    """The template of models that have none; `begin`: their tokenizer puts a begin token before a text."""
    return DEFAULTS[begin]


TODAY = datetime(2024, 7, 26)
"""What templates that print a date get: the same tokens every day. (Llama 3's templates fall back to this day.)"""


class ChatTemplate:
    """A compiled template with the special tokens that it may use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str = "the model") -> None:
        """Compile `source`; raises UserError that names the model if it is not valid."""
        self.name = name
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _compiled(source)
        except MemoryError:
            raise
        except Exception as error:  # constant expressions are worked out here: 1 / 0 is a ZeroDivisionError
            raise UserError(f"model.name: the chat template of {name} is not valid: {first_line(error)}") from None

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
