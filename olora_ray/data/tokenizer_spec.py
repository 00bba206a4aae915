"""What tokenising takes of a model: its tokenizer, its chat templates, its special tokens."""

import logging
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_json
from olora_ray.data import chat_template as template
from olora_ray.data import template_probe, template_trial

# The ids of a tokenizer's tokens.


LARGEST_ID = 2**24
"""Of a token; the largest vocabularies have some hundred thousand."""


def check(backend: Any, name: str) -> None:
    """Raise UserError for an absurd id: a tokenizer as JSON takes memory for every id up to the largest."""
    token, largest = _largest(backend)
    if largest > LARGEST_ID:
        raise UserError(
            f"model.name: tokenizer.json of {name} gives the token {token[:40]!r} the id {largest}, above {LARGEST_ID}:"
            " no model has so many; put the right tokenizer.json in its folder"
        )


def has_tokens_beyond(tokenizer: Any, embeddings: int) -> bool:
    """Whether a transformers tokenizer has tokens to which no row of so many embeddings belongs."""
    return _largest(tokenizer.backend_tokenizer)[1] >= embeddings


def _largest(backend: Any) -> tuple[str, int]:
    """The token with the largest id."""
    return max(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", 0))


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerSpec:
    """All that tokenising needs, as plain data: it travels to tasks that do not import transformers."""

    json: str
    """The tokenizer in the JSON form of the `tokenizers` package."""
    chat_template: str
    """Jinja source."""
    special_tokens: dict[str, str]
    """bos_token, eos_token and so on, as the template sees them."""
    eos_id: int
    """Ends an answer or a document."""
    bos_id: int | None = None
    add_bos: bool = False
    """Whether plain text starts with the begin token."""
    tool_template: str | None = None
    """Jinja source for conversations with tools, where that is another."""
    embeddings: int | None = None
    """Rows of the model's embeddings, if the tokenizer has tokens beyond them; None: each token has one."""
    name: str = field(default="the model", compare=False)
    """Name of the model in messages; not part of the digest."""
    apart: str | None = field(default=None, compare=False)
    """Why data.packing=auto gives each example a sequence of its own; a plan's digest has what follows from it."""

    def packing(self, wanted: Literal["auto"] | bool) -> bool:
        """Whether several examples share a sequence, for data.packing."""
        return self.apart is None if wanted == "auto" else wanted

    @property
    def has_template(self) -> bool:
        """Whether the model comes with a chat template."""
        return self.chat_template not in template.DEFAULTS

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that has an influence on tokens."""
        content = asdict(self)
        del content["name"], content["apart"]
        if self.tool_template is None:  # so that others are called as they were before there was this field
            del content["tool_template"]
        if self.embeddings is None:
            del content["embeddings"]
        return digest_json(content)

    def template(self, tools: bool) -> str:
        """The Jinja source for conversations with tools, or without."""
        return self.tool_template or self.chat_template if tools else self.chat_template

    def try_templates(self) -> None:
        """Raise UserError for a hostile template."""
        for source in self._templates():
            template_trial.check(source, self.special_tokens, self.name)

    def take_templates_as_tried(self) -> None:
        """See template_trial.take_as_tried."""
        for source in self._templates():
            template_trial.take_as_tried(source, self.special_tokens)

    def _templates(self) -> set[str]:
        return {self.template(tools) for tools in (False, True)}

    def parses_arguments(self, tools: bool) -> bool:
        """Whether arguments of tool calls that are JSON text are given to that template as objects."""
        return template_probe.wants_objects(self.template(tools), self.special_tokens, self.name)

    def wants_null(self, tools: bool) -> bool:
        """Whether a message of tool calls alone is given to that template with null for its content."""
        return template_probe.wants_null(self.template(tools), self.special_tokens, self.name)


def spec_from_pretrained(tokenizer: Any, name: str | None = None) -> TokenizerSpec:
    """The spec of a transformers tokenizer.

    Raises UserError if it is not a fast one, has no end token, or a token of an absurd id. A tokenizer without
    chat template gets `template.default`, with a warning.
    """
    name = name or str(getattr(tokenizer, "name_or_path", "") or "the model")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        raise UserError(f"model.name: the tokenizer of {name} is not a fast one (it needs a tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name: the tokenizer of {name} has no end token (eos_token), so answers would never end")
    check(backend, name)
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    source = (named.get("default") or next(iter(named.values()), None)) if named else tokenizer.chat_template
    for_tools = named.get("tool_use")
    add_bos = adds_begin_token(tokenizer)
    if not source:
        log.warning("%s has no chat template: conversations are written as 'User: ...' and 'Assistant: ...'", name)
        source = template.default(add_bos)
    return TokenizerSpec(
        json=backend.to_str(),
        chat_template=str(source),
        special_tokens={
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        },
        eos_id=int(tokenizer.eos_token_id),
        bos_id=tokenizer.bos_token_id,
        add_bos=add_bos,
        tool_template=str(for_tools) if for_tools and for_tools != source else None,
        name=name,
    )


def adds_begin_token(tokenizer: Any) -> bool:
    """Whether a transformers tokenizer puts its begin token before a text."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"][:1]) == [tokenizer.bos_token_id]
