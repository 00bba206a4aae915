"""The parts of a model that tokenising needs: its tokenizer, its chat templates, its special tokens."""

import logging
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.storage import digest_json
from olora_ray.data import chat_template
from olora_ray.data.chat_template import ChatForm, ChatTemplate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that tokenising needs, as plain data: it travels to tasks that do not import transformers."""

    json: str
    """The tokenizer in the JSON form of the `tokenizers` package."""
    chat_template: str
    """Jinja source."""
    special_tokens: dict[str, str]
    """bos_token, eos_token and so on, as the template sees them."""
    eos_id: int
    """Token that ends an answer or a document."""
    bos_id: int | None = None
    add_bos: bool = False
    """True if plain text starts with the begin token."""
    tool_template: str | None = None
    """Jinja source for conversations with tools, if it is another one."""
    embeddings: int | None = None
    """Rows of the model's embeddings, if the tokenizer has tokens beyond them; None: each token has one."""
    name: str = field(default="the model", compare=False)
    """The model's name in messages; not part of the digest."""
    apart: str | None = field(default=None, compare=False)
    """Why data.packing=auto gives each example its own sequence; a plan's digest has the decision."""
    ends: tuple[int, ...] = field(default=(), compare=False)
    """Ids at which the model stops, by its own files; a plan's digest has what follows from them."""
    chosen: str = field(default="", compare=False)
    """The value of data.chat_template; empty: the template is the model's."""

    def packing(self, wanted: Literal["auto"] | bool) -> bool:
        return self.apart is None if wanted == "auto" else wanted

    @property
    def has_template(self) -> bool:
        """True if the model comes with a chat template, or data.chat_template names one."""
        return bool(self.chosen) or self.chat_template not in chat_template.DEFAULTS

    @property
    def what(self) -> str:
        return f"the chat template {self.chosen}" if self.chosen else f"the chat template of {self.name}"

    @property
    def setting(self) -> str:
        return f"{'data.chat_template' if self.chosen else 'model.name'}: {self.what}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that influences tokens."""
        content = asdict(self)
        del content["name"], content["apart"], content["ends"], content["chosen"]
        if self.tool_template is None:  # other tokenizers keep the digest that they had before this field existed
            del content["tool_template"]
        if self.embeddings is None:
            del content["embeddings"]
        return digest_json(content)

    def template(self, tools: bool) -> str:
        return self.tool_template or self.chat_template if tools else self.chat_template

    def compiled(self, tools: bool) -> ChatTemplate:
        """Compile the template for conversations with tools, or without; raise UserError if it is not valid."""
        return ChatTemplate(self.template(tools), self.special_tokens, self.setting)

    def chat_form(self, tools: bool) -> ChatForm:
        """Return the form of chats with tools, or without; raise UserError if the template is not valid."""
        self.compiled(tools)
        return chat_template.chat_form(self.template(tools), self.special_tokens, self.what)


def spec_from_pretrained(tokenizer: Any, name: str | None = None, chosen: str = "") -> TokenizerSpec:
    """Return the spec of a transformers tokenizer, with the template that `chosen` (data.chat_template) names.

    Raise UserError if it is not a fast tokenizer, has no end token, has a token with an absurd id, or if the chosen
    template is not valid. A tokenizer without chat template gets one of `chat_template.DEFAULTS`, with a warning.
    """
    name = name or str(getattr(tokenizer, "name_or_path", "") or "the model")
    if chosen:
        _choose_template(tokenizer, chosen)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        raise UserError(
            f"model.name: the tokenizer of {name} is not a fast tokenizer; name a model with a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name: the tokenizer of {name} has no end token (eos_token), so answers would never end")
    # A tokenizer as JSON takes memory for every id up to the largest; real vocabularies have some hundred thousand.
    if (largest := _largest_id(tokenizer)) > 2**24:
        raise UserError(
            f"model.name: tokenizer.json of {name} has the token id {largest}, but no model has so many tokens; put the"
            " right tokenizer.json in its folder"
        )
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    source = (named.get("default") or next(iter(named.values()), None)) if named else tokenizer.chat_template
    for_tools = named.get("tool_use")
    add_bos = adds_begin_token(tokenizer)
    if not source:
        log.warning("%s has no chat template: conversations are written as 'User: ...' and 'Assistant: ...'", name)
        source = plain_template(tokenizer)
    spec = TokenizerSpec(
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
        chosen=chosen,
    )
    if chosen:
        spec.compiled(tools=False)
    return spec


def has_tokens_beyond(tokenizer: Any, embeddings: int) -> bool:
    """True if a transformers tokenizer has tokens without a row in so many embeddings."""
    return _largest_id(tokenizer) >= embeddings


def _largest_id(tokenizer: Any) -> int:
    return max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values(), default=0)


def _choose_template(tokenizer: Any, chosen: str) -> None:
    source = plain_template(tokenizer)
    if chosen != chat_template.PLAIN:
        what = f"data.chat_template: {chosen}"
        with as_user_error(what, OSError, UnicodeDecodeError, reason=short_reason):
            source = storage.read_text(chosen) if storage.exists(chosen) else ""
        if not source.strip():
            raise UserError(f"{what} is missing or empty; name a Jinja file, or {chat_template.PLAIN}")
    tokenizer.chat_template = source


def plain_template(tokenizer: Any) -> str:
    """Return the chat template for a transformers tokenizer that has none of its own."""
    return chat_template.DEFAULTS[adds_begin_token(tokenizer)]


def adds_begin_token(tokenizer: Any) -> bool:
    """True if a transformers tokenizer puts its begin token before a text."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"][:1]) == [tokenizer.bos_token_id]
