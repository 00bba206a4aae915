"""Tokeniser of examples: token ids, and the mask of the tokens that are trained on.

    example                 text                                  supervised
    chat                    the model's chat template             the assistant's answers, with the end of their turns
    prompt and completion   [begin token] + prompt | completion   completion and end token
                            + end token
    text                    [begin token] + text + end token      everything

The first token of a sequence is never supervised: nothing predicts it. What the assistant wrote is
found by rendering prefixes of the conversation, so templates without generation marks work:

    render(messages[:i], generation prompt)  must be a prefix of  render(messages[:i + 1])

A text is cut where an answer begins and each part is tokenised alone, as at inference, where the prompt is tokenised
before the answer exists: train/generate.py asks with just the tokens that stand here before an answer. An example
without a supervised token of its own answer is rejected; the end token alone does not count.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.digests import digest_json
from olora_ray.common.errors import UserError, first_line
from olora_ray.data import chat_template as template
from olora_ray.data import template_trial, token_ids, tool_calls
from olora_ray.data.chat_form import ChatForm
from olora_ray.data.encoder import Encoder
from olora_ray.data.example import Chat, Completion, Example, Rejected, Text

log = logging.getLogger(__name__)

Span = tuple[int, int]


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

    def parses_arguments(self, tools: bool) -> bool:
        """Whether arguments of tool calls that are JSON text are given to that template as objects."""
        return tool_calls.wants_objects(self.template(tools), self.special_tokens, self.name)

    def wants_null(self, tools: bool) -> bool:
        """Whether a message of tool calls alone is given to that template with null for its content."""
        return tool_calls.wants_null(self.template(tools), self.special_tokens, self.name)


@dataclass(frozen=True)
class Tokens:
    """One example, ready to be packed."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """Same length as `ids`."""


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
    token_ids.check(backend, name)
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


@dataclass(frozen=True)
class Begun:
    """An example of which it is known what is to be tokenised."""

    example: Example
    texts: list[str]
    finish: Callable[[], list[Tokens]]
    """Its tokens: one piece, or several for a long text; raises Rejected for an example that cannot be used."""


class ExampleTokenizer:
    """Turns examples into tokens of at most `max_length`."""

    def __init__(self, spec: TokenizerSpec, max_length: int, last_turn_only: bool = False) -> None:
        """Load the tokenizer and compile the template; raises UserError for one that is broken or hostile.

        `last_turn_only`: of a chat only the last answer is trained on.
        """
        self._spec = spec
        self._max_length = max_length
        self._last_turn_only = last_turn_only
        self._encoder = Encoder(spec.json, spec.name)
        self._special = self._encoder.special_ids() | {spec.eos_id}
        self._unknown = self._encoder.id_of(spec.special_tokens.get("unk_token"))
        for source in {spec.template(tools) for tools in (False, True)}:
            template_trial.check(source, spec.special_tokens, spec.name)
        self._templates = [
            template.ChatTemplate(spec.template(tools), spec.special_tokens, spec.name) for tools in (False, True)
        ]
        self._forms = [ChatForm(spec.template(tools), spec.special_tokens, spec.name, tools) for tools in (False, True)]

    def __call__(self, example: Example) -> list[Tokens]:
        """The tokens of an example: one piece, or several for a long text.

        Raises Rejected for an example that cannot be used.
        """
        return self.begin(example).finish()

    def begin(self, example: Example) -> Begun:
        """What of an example is to be tokenised; raises Rejected for one that cannot be used."""
        match example:
            case Chat():
                parts = self._parts(example)
                texts = [cut for text, answers in parts for cut in _cuts(text, answers)]
                return Begun(example, texts, lambda: [self._masked(text, answers) for text, answers in parts])
            case Completion():
                return Begun(example, [example.prompt, example.completion], lambda: [self._completion(example)])
            case Text():
                return Begun(example, [example.text], lambda: self._text(example))

    def ahead(self, texts: Sequence[str]) -> None:
        """Tokenise texts of several examples together, which takes less time; the examples are finished then."""
        self._encoder.ahead(texts)

    def ends(self, tokens: Tokens) -> bool:
        """Whether what is supervised ends with a special token, so that the model learns where to stop."""
        return int(tokens.ids[np.flatnonzero(tokens.supervised)[-1]]) in self._special

    def _parts(self, chat: Chat) -> list[tuple[str, list[Span]]]:
        """Texts of a chat, and where the answers lie in each."""
        chat = self._forms[chat.tools is not None](chat)
        trained = [
            number
            for number, message in enumerate(chat.messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
        if self._last_turn_only:
            trained = trained[-1:]
        full = self._render(chat, len(chat.messages))
        answers = {number: self._answer(chat, number, full) for number in trained}
        self._require_calls(chat, answers)
        spans = list(answers.values())
        if all(full.startswith(text) for text, _ in spans):
            return [(full, [span for _, span in spans])]
        # The template shows an answer differently once the conversation continues (it drops the reasoning
        # of earlier turns, say): what the model is asked to write then exists only at the end of a prefix.
        return [(text, [span]) for text, span in spans]

    def _answer(self, chat: Chat, number: int, full: str) -> tuple[str, Span]:
        """The text up to answer `number`, and where the answer lies in it."""
        before = self._render(chat, number, add_generation_prompt=True)
        text = self._render(chat, number + 1) if number + 1 < len(chat.messages) else full
        if not text.startswith(before):
            same = _same(before, text)
            raise Rejected(
                "template",
                f"the chat template of {self._spec.name} does not continue its own generation prompt,"
                f" so the answers cannot be told from the prompt: message {number + 1} should start after"
                f" {before[max(0, same - 20) :][:60]!r}, but is {text[max(0, same - 20) :][:60]!r}",
            )
        return text, (len(before), len(text.rstrip()))

    def _require_calls(self, chat: Chat, answers: Mapping[int, tuple[str, Span]]) -> None:
        """Raise Rejected where the template leaves a tool call out, be it trained or context of a later answer."""
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant" or not message.get("tool_calls"):
                continue
            if number in answers:
                text, (start, _) = answers[number]
            else:
                text = self._render(chat, number + 1)
                start = _same(self._render(chat, number), text)
            if (function := tool_calls.left_out(message, text[start:])) is not None:
                raise Rejected(
                    "template",
                    f"message {number + 1}: the chat template of {self._spec.name} leaves the tool call out (of"
                    f" {function!r}): take a base whose chat template writes it, or rows without tool calls",
                )

    def _render(self, chat: Chat, stop: int, add_generation_prompt: bool = False) -> str:
        chosen = self._templates[chat.tools is not None]
        try:
            return chosen.render(chat.messages[:stop], add_generation_prompt, chat.tools)
        except Exception as error:  # a template is code: it may raise anything
            what = f"the chat template of {self._spec.name} refuses the conversation"
            raise Rejected("template", f"{what}: {first_line(error)}") from None

    def _masked(self, text: str, answers: list[Span]) -> Tokens:
        """The tokens of a text with its answers supervised; each part that begins with one is tokenised alone."""
        before, *parts = _cuts(text, answers)
        ids = self._encoder.ids(before)
        supervised = [np.zeros(len(ids), dtype=bool)]
        for (start, stop), part in zip(answers, parts, strict=True):
            piece = self._encoder.encode(part, continues=start > 0)
            # A token that begins in the answer is the model's to write, wherever it ends.
            mask = piece.starts < stop - start
            written = [number for number, inside in zip(piece.ids, mask, strict=True) if inside]
            if written and written[-1] in self._special:
                written.pop()  # the end of the turn
            self._require_own(written, bool(ids))
            ids += piece.ids
            supervised.append(mask)
        return self._checked(np.asarray(ids, dtype=np.int32), np.concatenate(supervised))

    def _completion(self, example: Completion) -> Tokens:
        prompt = self._encoder.ids(example.prompt)
        answer = self._encoder.ids(example.completion, continues=bool(prompt))
        asked = [*self._begin([*prompt, *answer]), *prompt]
        self._require_own(answer, bool(asked))
        ids = np.asarray([*asked, *answer, *self._end(answer)], dtype=np.int32)
        return self._checked(ids, np.arange(len(ids)) >= len(asked))

    def _text(self, example: Text) -> list[Tokens]:
        found = self._encoder.ids(example.text)
        ids = np.asarray([*self._begin(found), *found, *self._end(found)], dtype=np.int32)
        # A piece begins with the last token of the one before: each token but the first is predicted once.
        starts = range(0, max(len(ids) - 1, 1), self._max_length - 1)
        pieces = [ids[start : start + self._max_length] for start in starts]
        return [self._checked(piece, np.ones(len(piece), dtype=bool)) for piece in pieces]

    def _begin(self, ids: list[int]) -> list[int]:
        """The begin token, where the tokenizer puts one and the text does not have it already."""
        bos = self._spec.bos_id
        return [bos] if self._spec.add_bos and bos is not None and ids[:1] != [bos] else []

    def _end(self, ids: list[int]) -> list[int]:
        """The end token, unless the text ends with it."""
        return [self._spec.eos_id] if ids[-1:] != [self._spec.eos_id] else []

    def _require_own(self, written: list[int], asked: bool) -> None:
        """Raise Rejected if none of the tokens, the end of the turn left out, says anything.

        `asked`: something stands before them, so that their first is trained on, too.
        """
        mute = (self._unknown, self._spec.eos_id)
        trained = written if asked else written[1:]
        says = any(number not in mute and not self._encoder.is_blank(number) for number in written)
        if not says or all(number in mute for number in trained):
            raise Rejected("no_supervised_token", "no token of the answer itself is left to train on")

    def _checked(self, ids: NDArray[np.int32], supervised: NDArray[np.bool_]) -> Tokens:
        if len(ids) > self._max_length:
            raise Rejected("too_long", f"{len(ids)} tokens, more than data.max_length = {self._max_length}")
        if (rows := self._spec.embeddings) is not None and (largest := int(ids.max(initial=0))) >= rows:
            token = self._encoder.token_of(largest)
            raise Rejected("no_embedding", f"the token {token!r} ({largest}) is beyond the model's {rows} embeddings")
        supervised[:1] = False
        if not supervised.any():
            raise Rejected("no_supervised_token", "no token of the answer itself is left to train on")
        return Tokens(ids, supervised)


def _cuts(text: str, answers: Sequence[Span]) -> list[str]:
    """What is before the first answer, and each answer with what follows it."""
    return [text[low:high] for low, high in pairwise([0, *(start for start, _ in answers), len(text)])]


def _same(text: str, other: str) -> int:
    """How many characters two texts begin with together."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, another) in pairs if one != another), min(len(text), len(other)))
