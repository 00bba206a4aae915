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

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import first_line
from olora_ray.config.schema import Source
from olora_ray.data.chat_template import EXCHANGE, ChatTemplate, left_out
from olora_ray.data.encoder import Encoder
from olora_ray.data.formats import Chat, Completion, Example, Rejected, Text
from olora_ray.data.tokenizer_spec import TokenizerSpec

Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """One example, ready to be packed."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """Same length as `ids`."""


@dataclass(frozen=True)
class Begun:
    """An example of which it is known what is to be tokenised."""

    example: Example
    answers: Sequence[str]
    """Texts that are tokenised with the places of their tokens: answers of a chat, with what follows them."""
    texts: Sequence[str]
    """Texts of which the tokens alone are needed."""
    finish: Callable[[], list[Tokens]]
    """Its tokens: one piece, or several for a long text; raises Rejected for an example that cannot be used."""

    @property
    def size(self) -> int:
        """Characters to be tokenised."""
        return sum(map(len, self.answers)) + sum(map(len, self.texts))


class ExampleTokenizer:
    """Turns examples into tokens of at most `max_length`."""

    def __init__(self, spec: TokenizerSpec, max_length: int, last_turn_only: bool = False) -> None:
        """Load the tokenizer and compile the template; raises UserError for one that is broken.

        `last_turn_only`: of a chat only the last answer is trained on.
        """
        self._spec = spec
        self._max_length = max_length
        self._last_turn_only = last_turn_only
        self._encoder = Encoder(spec.json, spec.name)
        self._special = self._encoder.special_ids() | {spec.eos_id}
        self._unknown = self._encoder.id_of(spec.special_tokens.get("unk_token"))
        self._templates = [
            ChatTemplate(spec.template(tools), spec.special_tokens, spec.name) for tools in (False, True)
        ]
        self._forms = [spec.chat_form(tools) for tools in (False, True)]

    def __call__(self, example: Example) -> list[Tokens]:
        """The tokens of an example: one piece, or several for a long text.

        Raises Rejected for an example that cannot be used.
        """
        return self.begin(example).finish()

    def begin(self, example: Example) -> Begun:
        """What of an example is to be tokenised; raises Rejected for one that cannot be used."""
        match example:
            case Chat():
                parts = [(_cuts(text, spans), spans) for text, spans in self._parts(example)]
                answers = [cut for (_, *cuts), _ in parts for cut in cuts]
                before = [cuts[0] for cuts, _ in parts]
                return Begun(example, answers, before, lambda: [self._masked(*part) for part in parts])
            case Completion():
                texts = (example.prompt, example.completion)
                return Begun(example, (), texts, lambda: [self._completion(example)])
            case Text():
                return Begun(example, (), (example.text,), lambda: self._text(example))

    def ahead(self, begun: Sequence[Begun]) -> None:
        """Tokenise the texts of several examples together, which takes less time; the examples are finished then."""
        answers = [text for one in begun for text in one.answers]
        self._encoder.ahead(answers, [text for one in begun for text in one.texts])

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
            if (function := left_out(message, text[start:])) is not None:
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

    def _masked(self, cuts: Sequence[str], spans: Sequence[Span]) -> Tokens:
        """The tokens of a text that is cut where answers begin, each cut tokenised alone, with the answers supervised.

        `spans`: where they lie in the whole text.
        """
        before, *parts = cuts
        ids, written_at = self._encoder.ids(before), []
        for (start, stop), part in zip(spans, parts, strict=True):
            piece = self._encoder.encode(part, continues=start > 0)
            # A token that begins in the answer is the model's to write, wherever it ends.
            count = piece.starting_before(stop - start)
            written = piece.ids[:count]
            if written and written[-1] in self._special:
                written.pop()  # the end of the turn
            self._require_own(written, bool(ids))
            written_at.append(slice(len(ids), len(ids) + count))
            ids += piece.ids
        supervised = np.zeros(len(ids), dtype=bool)
        for place in written_at:
            supervised[place] = True
        return self._checked(np.asarray(ids, dtype=np.int32), supervised)

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


# The token with which a chat template ends an answer, and where a model that is trained on its chats stops writing.


def turn_end(spec: TokenizerSpec) -> int | None:
    """Its id; None where the template writes no special token right after an answer, or renders no plain chat."""
    try:
        text = ChatTemplate(spec.chat_template, spec.special_tokens, spec.name).render(EXCHANGE)
        _, answer, after = text.rpartition(EXCHANGE[1]["content"])
        encoder = Encoder(spec.json, spec.name)
        first = encoder.ids(after.strip())[:1] if answer else []
    except Exception:  # a template is code and may raise anything; whoever makes tokens with it is told
        return None
    return first[0] if first and first[0] in encoder.special_ids() else None


# The form in which a source's prompts and completions are trained: turns of a chat, or joined texts.


RULES = {"text": 2, "prompt_completion": 3, "alpaca": 2, "sharegpt": 2}
"""Counts how often the tokens of a format's rows have changed; 1 for those that are not named."""
WITH_TOOLS = ("messages", "prompt_completion", "sharegpt")
"""Formats whose messages may have tool calls."""
COLUMNS_OF_STRUCTS = {"parquet", "arrow"}
"""Kinds of files in which an object has the keys of all rows."""


def as_chat(source: Source, spec: TokenizerSpec) -> bool:
    """Whether the prompts and completions of a source are turns of a chat."""
    if source.format != "prompt_completion":
        return False
    return spec.has_template if source.chat == "auto" else source.chat


def digest_inputs(source: Source, spec: TokenizerSpec, kinds: Collection[str]) -> dict[str, Any]:
    """What decides the tokens of a source beside its setting; `kinds` are those of its files.

    Empty where the same rows have always had the same tokens.
    """
    found: dict[str, Any] = {}
    if source.format in RULES:
        found["rules"] = RULES[source.format]
    elif COLUMNS_OF_STRUCTS.intersection(kinds):
        found["rules"] = 2
    if source.format in WITH_TOOLS and COLUMNS_OF_STRUCTS.intersection(kinds):
        found["maps"] = "objects"
    if source.format == "prompt_completion":
        found["chat"] = as_chat(source, spec)
    chats = source.format in WITH_TOOLS and found.get("chat", True)
    if chats and any(spec.chat_form(tools).parses_arguments for tools in (False, True)):
        found["arguments"] = "objects"
    if chats and any(spec.chat_form(tools).wants_null for tools in (False, True)):
        found["calls_alone"] = "null"
    return found


def form_line(source: Source, spec: TokenizerSpec, setting: str) -> str | None:
    """Which form the rows of a source have, in a line; None where their format leaves no choice."""
    if source.format != "prompt_completion":
        return None
    if as_chat(source, spec):
        template = "its chat template" if spec.has_template else "the plain chat template, since it has none"
        return f"{setting}: prompts and completions are turns of a chat; {spec.name} gets them through {template}"
    warning = f", but {spec.name} has one and is served with it" if spec.has_template else f": {spec.name} has none"
    return f"{setting}: prompts and completions are joined as they are, without a chat template{warning}"
