"""Tokeniser of examples: token ids, and the mask of the tokens that are trained on.

    example                 text                                  supervised
    chat                    the model's chat template             the assistant's answers, with the end of their turns
    prompt and completion   prompt + completion + end token       completion and end token
    text                    [begin token] + text + end token      everything

The first token of a sequence is never supervised: nothing predicts it. What the assistant wrote is
found by rendering prefixes of the conversation, so templates without generation marks work:

    render(messages[:i], generation prompt)  must be a prefix of  render(messages[:i + 1])
"""

import logging
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from olora_ray.common.digests import digest_json
from olora_ray.common.errors import UserError
from olora_ray.data import chat_template as template
from olora_ray.data.formats import Chat, Completion, Example, Rejected, Text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

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
    name: str = field(default="the model", compare=False)
    """Name of the model in messages; not part of the digest."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that has an influence on tokens."""
        content = asdict(self)
        del content["name"]
        return digest_json(content)


@dataclass(frozen=True)
class Tokens:
    """One example, ready to be packed."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """Same length as `ids`."""


def spec_from_pretrained(tokenizer: Any, name: str | None = None) -> TokenizerSpec:
    """The spec of a transformers tokenizer.

    Raises UserError if it is not a fast one or has no end token. A tokenizer without chat template
    gets `template.DEFAULT`, with a warning.
    """
    name = name or str(getattr(tokenizer, "name_or_path", "") or "the model")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        raise UserError(f"model.name: the tokenizer of {name} is not a fast one (it needs a tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name: the tokenizer of {name} has no end token (eos_token), so answers would never end")
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default") or next(iter(source.values()), None)
    if not source:
        log.warning("%s has no chat template: conversations are written as 'User: ...' and 'Assistant: ...'", name)
        source = template.DEFAULT
    begin = tokenizer("a")["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    return TokenizerSpec(
        json=backend.to_str(),
        chat_template=str(source),
        special_tokens={
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        },
        eos_id=int(tokenizer.eos_token_id),
        bos_id=tokenizer.bos_token_id,
        add_bos=list(begin) == [tokenizer.bos_token_id],
        name=name,
    )


@lru_cache(maxsize=4)
def tokenizer_of(spec_digest: str, content: str) -> "Tokenizer":
    """The tokenizer of a spec, loaded once in a process."""
    from tokenizers import Tokenizer

    # A task has its own core; threads of its own would only get in the way of the other tasks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = Tokenizer.from_str(content)
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


class ExampleTokenizer:
    """Turns examples into tokens of at most `max_length`."""

    def __init__(self, spec: TokenizerSpec, max_length: int) -> None:
        """Load the tokenizer and compile the template; raises UserError for a broken template."""
        self._spec = spec
        self._max_length = max_length
        self._tokenizer = tokenizer_of(spec.digest, spec.json)
        self._template = template.ChatTemplate(spec.chat_template, spec.special_tokens, spec.name)

    def __call__(self, example: Example) -> list[Tokens]:
        """The tokens of an example: one piece, or several for a long text.

        Raises Rejected for an example that cannot be used, UserError for a template that cannot be.
        """
        match example:
            case Chat():
                return self._chat(example)
            case Completion():
                return [self._completion(example)]
            case Text():
                return self._text(example)

    def _chat(self, chat: Chat) -> list[Tokens]:
        answers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        trained = [number for number in answers if chat.messages[number].get("weight") != 0]
        full = self._render(chat, len(chat.messages))
        spans = [self._answer(chat, number, full) for number in trained]
        if all(full.startswith(text) for text, _ in spans):
            return [self._masked(full, [span for _, span in spans])]
        # The template shows an answer differently once the conversation continues (it drops the reasoning
        # of earlier turns, say): what the model is asked to write then exists only at the end of a prefix.
        return [self._masked(text, [span]) for text, span in spans]

    def _answer(self, chat: Chat, number: int, full: str) -> tuple[str, Span]:
        """The text up to answer `number`, and where the answer lies in it."""
        before = self._render(chat, number, add_generation_prompt=True)
        text = self._render(chat, number + 1) if number + 1 < len(chat.messages) else full
        if not text.startswith(before):
            same = next((i for i, pair in enumerate(zip(before, text, strict=False)) if pair[0] != pair[1]), len(text))
            raise UserError(
                f"model.name: the chat template of {self._template.name} does not continue its own generation prompt,"
                f" so the answers cannot be told from the prompt: message {number + 1} should start after"
                f" {before[max(0, same - 20) :][:60]!r}, but is {text[max(0, same - 20) :][:60]!r}"
            )
        return text, (len(before), len(text.rstrip()))

    def _render(self, chat: Chat, stop: int, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(chat.messages[:stop], add_generation_prompt, chat.tools)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise Rejected("template", f"the chat template refuses the conversation: {error}") from None

    def _masked(self, text: str, spans: list[Span]) -> Tokens:
        encoding = self._encode(text)
        return self._checked(np.asarray(encoding.ids, dtype=np.int32), _inside(encoding, spans))

    def _completion(self, example: Completion) -> Tokens:
        text = example.prompt + example.completion
        encoding = self._encode(text)
        inside = _inside(encoding, [(len(example.prompt), len(text))])
        return self._checked(self._framed(encoding.ids), np.concatenate([self._begin_mask(), inside, [True]]))

    def _text(self, example: Text) -> list[Tokens]:
        ids = self._framed(self._encode(example.text).ids)
        pieces = [ids[start : start + self._max_length] for start in range(0, len(ids), self._max_length)]
        return [self._checked(piece, np.ones(len(piece), dtype=bool)) for piece in pieces if len(piece) > 1]

    def _encode(self, text: str) -> "Encoding":
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # half a surrogate pair, which JSON can hold and UTF-8 cannot
            raise Rejected("bad_text", "the text has half a surrogate pair (\\ud800 to \\udfff)") from None

    def _begin_mask(self) -> NDArray[np.bool_]:
        return np.zeros(int(self._spec.add_bos), dtype=bool)

    def _framed(self, ids: list[int]) -> NDArray[np.int32]:
        begin = [self._spec.bos_id] if self._spec.add_bos and self._spec.bos_id is not None else []
        return np.asarray([*begin, *ids, self._spec.eos_id], dtype=np.int32)

    def _checked(self, ids: NDArray[np.int32], supervised: NDArray[np.bool_]) -> Tokens:
        if len(ids) > self._max_length:
            raise Rejected("too_long", f"{len(ids)} tokens, more than data.max_length = {self._max_length}")
        supervised[:1] = False
        if not supervised.any():
            raise Rejected("no_supervised_token", "no token of the answer is left to train on")
        return Tokens(ids, supervised)


def _inside(encoding: "Encoding", spans: list[Span]) -> NDArray[np.bool_]:
    """Which tokens lie wholly in one of the spans of characters."""
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        inside |= (offsets[:, 0] >= start) & (offsets[:, 0] < stop) & (offsets[:, 1] <= stop)
    return inside
