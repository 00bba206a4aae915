"""The parts of a model that tokenising needs: its tokenizer, its chat templates, its special tokens."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.storage import digest_json
from olora_ray.data import chat_template
from olora_ray.data.chat_template import (
    EXCHANGE,
    ChatForm,
    ChatTemplate,
    called,
    reasoning,
    text_of,
)
from olora_ray.data.encoder import Encoder
from olora_ray.data.formats.format import Chat

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

    @property
    def has_template(self) -> bool:
        """True if the model comes with a chat template, or data.chat_template names one."""
        return bool(self.chosen) or self.chat_template not in chat_template.DEFAULTS

    @property
    def what(self) -> str:
        return f"the chat template {self.chosen or f'of {self.name}'}"

    @property
    def setting(self) -> str:
        field = "data.chat_template" if self.chosen else "model.name"
        return f"{field}: {self.what}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that influences tokens."""
        content = asdict(self)
        del content["name"], content["apart"], content["ends"], content["chosen"]
        # Other tokenizers keep the digest that they had before these fields existed.
        for name in ("tool_template", "embeddings"):
            if content[name] is None:
                del content[name]
        return digest_json(content)

    def turn_end(self) -> int | None:
        """Return the id of the token that ends an answer; None if the template renders no plain chat."""
        try:
            encoder = Encoder(self.json, self.name)
            return encoder.id_of(end_of_turn(self, encoder, tools=False).last)
        except UserError:  # the tokenisation reports it
            return None

    def template(self, tools: bool) -> str:
        if tools and self.tool_template:
            return self.tool_template
        return self.chat_template

    def compiled(self, tools: bool) -> ChatTemplate:
        """Compile the template for conversations with tools, or without; raise UserError if it is not valid."""
        return ChatTemplate(self.template(tools), self.special_tokens, self.setting)

    def chat_form(self, tools: bool) -> ChatForm:
        """Return the form of chats with tools, or without; raise UserError if the template is not valid."""
        self.compiled(tools)
        special = tuple(sorted(self.special_tokens.items()))
        return chat_template.chat_form(self.template(tools), special, self.what)


# The end of an answer in a chat template: a model that is trained on its chats stops there.


CALL: dict[str, Any] = {
    "id": "call00000",
    "type": "function",
    "function": {"name": "f", "arguments": {"x": 1}},
}


@dataclass(frozen=True)
class EndOfTurn:
    """Fixes the end of an answer: one token at which the model stops, and nothing after it."""

    stops: tuple[str, ...]
    """Special tokens at which the model stops."""
    tail: str
    """Text that the template writes after the last message only, although that has ended (Phi-3: the end token)."""
    stop: str
    """Added to an answer without an end: the next role's token if the model stops at it (GLM-4.5), otherwise the end
    token."""
    call_stop: str
    """Like `stop`, after a tool call."""
    last: str
    """The token that ends a plain exchange; "" if there is none, or the template refuses the exchange."""
    fixes: bool = False
    """True if a plain exchange is changed."""
    cuts: bool = False
    """True if the template begins the next turn after a plain exchange (Cohere's Command A)."""

    def __call__(self, text: str, start: int, message: Mapping[str, Any]) -> str:
        """Fix the end of a conversation whose last message is the answer; it is written after `start`."""
        text = text.removesuffix(self.tail)
        calls = message.get("tool_calls") or ()
        parts = [str(reasoning(message) or "").strip(), text_of(message), *map(called, calls)]
        said = max([start, *[text.rfind(part, start) + len(part) for part in parts if part]])
        ends = [text.find(token, said) + len(token) for token in self.stops if token in text[said:]]
        if ends and text[min(ends) :].strip():  # the template begins the next turn
            return text[: min(ends)]
        stop = self.call_stop if calls else self.stop
        if stop and not ends:
            return text.rstrip() + stop
        return text


def end_of_turn(spec: TokenizerSpec, encoder: Encoder, tools: bool) -> EndOfTurn:
    template = spec.compiled(tools)
    form = spec.chat_form(tools)

    def written(*messages: Mapping[str, Any]) -> str:
        try:
            return template.render(form(Chat(tuple(map(dict, messages)))).messages)
        except Exception:  # a template is code: it may raise anything
            return ""

    question, answer = EXCHANGE
    call = {**answer, "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "1", "tool_call_id": CALL["id"], "name": "f"}
    plain = written(question, answer)
    continued = written(question, answer, question)
    of_call = written(question, call)
    of_result = written(question, call, result)

    eos = encoder.token_of(spec.eos_id) or ""
    put = eos if encoder.ids(eos).tolist() == [spec.eos_id] else ""
    texts = "".join([spec.template(tools), plain, continued, of_call, of_result])
    named = {encoder.token_of(number) or "" for number in encoder.special_ids()}
    found = {token for token in named if token in texts}
    special = tuple(sorted((found | {eos}) - {""}, key=len, reverse=True))
    any_special = "|".join(map(re.escape, special))

    def stop(text: str, longer: str) -> str:
        text = text.rstrip()
        if longer.startswith(text):
            match = re.compile(rf"\s*({any_special})").match(longer, len(text))
            if match and encoder.id_of(match[1]) in spec.ends:
                return match[0]
        return put

    # The tail that only the end of a conversation has: it follows the token that ends the answer in any case.
    said = answer["content"]
    parts = re.split(f"({any_special})", plain)
    pairs = zip(parts, re.split(f"({any_special})", continued), strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    shared = "".join(parts[:same])
    tail = "".join(parts[same:])
    if not (plain and continued and shared.rstrip().endswith(special) and tail.strip()):
        tail = ""
    if said in tail:
        tail = ""
    after = stop(plain, continued)
    ended = plain.removesuffix(tail).rstrip()
    stops = [token for token in special if token == eos or encoder.id_of(token) in spec.ends]
    ends = re.findall(any_special, ended[ended.rfind(said) :])
    last = [token for token in ends if token in stops]
    last += [token for token in special if ended.endswith(token)]
    if plain:
        last.append(after.strip())
    last.append("")
    end = EndOfTurn(tuple({*stops, last[0]} - {""}), tail, after, stop(of_call, of_result), last[0])
    fixed = end(plain, 0, answer) if plain else ""
    return replace(end, fixes=fixed != plain, cuts=len(fixed) < len(ended))


# The spec of a tokenizer of transformers.


def spec_from_pretrained(
    tokenizer: Any, name: str | None = None, chosen: str = "", embeddings: int | None = None
) -> TokenizerSpec:
    """Return the spec of a transformers tokenizer, with the template that `chosen` (data.chat_template) names.

    `embeddings` is the number of rows of the model's embeddings, if it is known.

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
        raise UserError(
            f"model.name: the tokenizer of {name} has no end token (eos_token), so answers would never end"
        )
    # A tokenizer as JSON takes memory for every id up to the largest; real vocabularies have some hundred thousand.
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if largest > 2**24:
        raise UserError(
            f"model.name: tokenizer.json of {name} has the token id {largest}, but no model has so many tokens; put the"
            " right tokenizer.json in its folder"
        )
    source = tokenizer.chat_template
    for_tools = None
    if isinstance(source, dict):
        for_tools = source.get("tool_use")
        source = source.get("default") or next(iter(source.values()), None)
    if not source:
        log.warning(
            "%s has no chat template: conversations are written as 'User: ...' and 'Assistant: ...'",
            name,
        )
        source = plain_template(tokenizer)
    if for_tools == source:
        for_tools = None
    if embeddings is not None and largest < embeddings:
        embeddings = None
    spec = TokenizerSpec(
        json=backend.to_str(),
        chat_template=str(source),
        special_tokens={
            key: str(value)
            for key, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        },
        eos_id=int(tokenizer.eos_token_id),
        bos_id=tokenizer.bos_token_id,
        add_bos=adds_begin_token(tokenizer),
        tool_template=str(for_tools) if for_tools else None,
        embeddings=embeddings,
        name=name,
        chosen=chosen,
    )
    if chosen:
        spec.compiled(tools=False)
    return spec


SHIPPED = Path(__file__).with_name("templates")


def _choose_template(tokenizer: Any, chosen: str) -> None:
    source = plain_template(tokenizer)
    if chosen != chat_template.PLAIN:
        what = f"data.chat_template: {chosen}"
        shipped = {file.stem: str(file) for file in sorted(SHIPPED.glob("*.jinja"))}
        place = shipped.get(chosen, chosen)
        with as_user_error(what, OSError, UnicodeDecodeError, reason=short_reason):
            source = storage.read_text(place) if storage.exists(place) else ""
        if not source.strip():
            raise UserError(
                f"{what} is missing or empty; name a Jinja file, {', '.join(shipped)} or {chat_template.PLAIN}"
            )
    tokenizer.chat_template = source


def plain_template(tokenizer: Any) -> str:
    """Return the chat template for a transformers tokenizer that has none of its own."""
    return chat_template.DEFAULTS[adds_begin_token(tokenizer)]


def adds_begin_token(tokenizer: Any) -> bool:
    """True if a transformers tokenizer puts its begin token before a text."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"][:1]) == [
        tokenizer.bos_token_id
    ]
