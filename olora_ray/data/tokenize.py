"""Tokeniser of examples: token ids, and the mask of the tokens that are trained on.

    example                 text                                  supervised
    chat                    the model's chat template             the assistant's answers, with the end of their turns
    prompt and completion   [begin token] + prompt | completion   completion and end token
                            + end token
    text                    [begin token] + text + end token      everything
    ids                     the row's own tokens                  as its labels say; without labels everything

The first token of a sequence is never supervised: nothing predicts it. The assistant's answers are
located by rendering prefixes of the conversation, so templates without generation marks work:

    render(messages[:i], generation prompt)  must be a prefix of  render(messages[:i + 1])

A text is cut where an answer begins, and each part is tokenised alone. At inference, too, the prompt is tokenised
before the answer exists: train/generate.py prompts with exactly the tokens that stand here before an answer. An
example whose answer has no supervised token is rejected; the end token alone does not count.

An example with more than `max_length` tokens is rejected or shortened (`data.too_long`). A shortened one keeps its
beginning: all tokens up to `max_length`, as in TRL and Axolotl, or those up to the end of the last answer that fits.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError, first_line
from olora_ray.config.schema import Source
from olora_ray.data.chat_template import EXCHANGE, left_out, reasoning, text_of
from olora_ray.data.encoder import Encoder
from olora_ray.data.encoder import Unlike as Unlike
from olora_ray.data.formats import REASONING, Chat, Completion, Example, Ids, Rejected, Text
from olora_ray.data.tokenizer_spec import TokenizerSpec

Span = tuple[int, int]

ANOTHER = "set data.chat_template to another template"
CALL: dict[str, Any] = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
# A document is tokenised in such parts, each up to the end of a word: tokenising takes 130 to 400 times their memory.
_STRETCH = re.compile(r".{1,524288}(?:(?<=\S)(?=\s)|\Z)|.{1,524288}", re.DOTALL)
_OPENED, _OPENED_ALSO = re.compile(r"<think>\s*\Z"), re.compile(r"\A<think>\s*")


@dataclass(frozen=True)
class Tokens:
    ids: NDArray[np.int32]
    # Same length as `ids`.
    supervised: NDArray[np.bool_]
    # True if the example was too long: these are the tokens that `data.too_long` keeps.
    shortened: bool = False


@dataclass(frozen=True)
class Begun:
    """An example whose texts are known, but not tokenised yet."""

    example: Example
    # Answers of a chat, each with the text that follows it, and the length of the answer itself.
    answers: Sequence[tuple[str, int]]
    # Texts to tokenise without offsets.
    texts: Sequence[str]
    # Returns the tokens, in several pieces for a long text; raises Rejected if the example cannot be used.
    finish: Callable[[], list[Tokens]]

    @property
    def size(self) -> int:
        tokens = len(self.example.ids) if isinstance(self.example, Ids) else 0
        return sum(len(text) for text, _ in self.answers) + sum(map(len, self.texts)) + tokens

    @property
    def longest(self) -> int:
        return max(len(text) for text in (*(text for text, _ in self.answers), *self.texts))


class ExampleTokenizer:
    """Turns examples into tokens of at most `max_length`."""

    def __init__(
        self, spec: TokenizerSpec, max_length: int, last_turn_only: bool = False, too_long: str = "reject"
    ) -> None:
        """Load the tokenizer and compile the template; raise UserError if one of them is broken.

        `last_turn_only`: only the last answer of a chat is supervised, with `drop_turns` the last that fits.
        """
        self._spec = spec
        self._max_length = max_length
        self._last_turn_only = last_turn_only
        self.too_long = too_long
        self._encoder = Encoder(spec.json, spec.name)
        self._special = self._encoder.special_ids() | {spec.eos_id}
        self._mute = (self._encoder.id_of(spec.special_tokens.get("unk_token")), spec.eos_id)
        self._templates = [spec.compiled(tools) for tools in (False, True)]
        self._forms = [spec.chat_form(tools) for tools in (False, True)]
        self._ends = [end_of_turn(spec, self._encoder, tools) for tools in (False, True)]

    def __call__(self, example: Example) -> list[Tokens]:
        """Return the tokens of an example, in several pieces for a long text; raise Rejected if it cannot be used."""
        return self.begin(example).finish()

    def begin(self, example: Example) -> Begun:
        """Return an example with the texts to tokenise; raise Rejected if it cannot be used."""
        match example:
            case Chat():
                parts = [(_cuts(text, spans), spans) for text, spans in self._parts(example)]
                answers = [
                    (cut, stop - start)
                    for (_, *cuts), spans in parts
                    for cut, (start, stop) in zip(cuts, spans, strict=True)
                ]
                before = [cuts[0] for cuts, _ in parts]
                return Begun(example, answers, before, lambda: self._chat(parts))
            case Completion():
                texts = (example.prompt, example.completion)
                return Begun(example, (), texts, lambda: [self._completion(example)])
            case Text():
                stretches = _STRETCH.findall(example.text)
                return Begun(example, (), stretches[:1], lambda: self._text(stretches))
            case Ids():
                return Begun(example, (), (), lambda: self._given(example))

    def ahead(self, begun: Sequence[Begun]) -> None:
        """Tokenise the texts of several examples in one batch, which takes less time; then finish each of them."""
        answers = [text for example in begun for text in example.answers]
        self._encoder.ahead(answers, [text for example in begun for text in example.texts])

    def ends(self, tokens: Tokens) -> bool:
        """True if the supervised tokens end with a special token, so that the model learns where to stop."""
        return int(tokens.ids[np.flatnonzero(tokens.supervised)[-1]]) in self._special

    def _parts(self, chat: Chat) -> list[tuple[str, list[Span]]]:
        chat = self._forms[chat.tools is not None](chat)
        trained = [
            number
            for number, message in enumerate(chat.messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
        if self._last_turn_only and self.too_long != "drop_turns":
            trained = trained[-1:]
        last = len(chat.messages) - 1
        full = self._render(chat, last + 1)
        answers = {number: self._answer(chat, number, full if number == last else None) for number in trained}
        self._require_all(chat, answers)
        if last in answers:
            full, _ = answers[last]
        if all(full.startswith(text) for text, _ in answers.values()):
            return [(full, [span for _, span in answers.values()])]
        # The template writes an answer differently once the conversation continues (for example without the reasoning
        # of earlier turns). The answer as the model must write it then exists only at the end of a prefix.
        return [(text, [span]) for text, span in answers.values()]

    def _answer(self, chat: Chat, number: int, text: str | None) -> tuple[str, Span]:
        """Return the text up to the end of answer `number`, and the span of the answer in it.

        `text` is the template's text, if it is rendered already.
        """
        before = self._render(chat, number, add_generation_prompt=True)
        text = self._render(chat, number + 1) if text is None else text
        text = self._ends[chat.tools is not None](text, bool(chat.messages[number].get("tool_calls")))
        if not text.startswith(before):
            text = before + self._continued(chat, number, before, text)
        return text, (len(before), len(text.rstrip()))

    def _continued(self, chat: Chat, number: int, before: str, text: str) -> str:
        """Return the answer's text after the generation prompt `before`, if `text` does not start with this prompt.

        A server feeds `before` to the model, even if the template's own `text` of the finished answer differs.
        """
        same = _same(before, text)
        if not before[same:].strip():
            return text[same:]
        # The prompt opens the reasoning (DeepSeek R1, Nemotron 3), and an answer has none, or loses it.
        if (opened := _OPENED.search(before)) and same >= opened.start():
            answer = _OPENED_ALSO.sub("", text[opened.start() :])
            if "</think>" in answer:
                return answer
            return f"{reasoning(chat.messages[number]) or ''}".strip() + "\n</think>\n\n" + answer.lstrip()
        # The prompt begins differently: the system message is written only into the last user message (Mistral).
        asked, answer = (text_of(chat.messages[each]) for each in (number - 1, number))
        tail = before[before.rfind(asked) :] if asked and asked in before else ""
        position = text.rfind(tail, 0, text.rfind(answer)) if tail else -1
        if position >= 0:
            return text[position + len(tail) :]
        raise Rejected(
            "template",
            f"{self._spec.what} does not continue its own generation prompt: message"
            f" {number + 1} should start after {before[max(0, same - 20) :][:60]!r}, but is"
            f" {text[max(0, same - 20) :][:60]!r}; remove such rows, or {ANOTHER}",
        )

    def _require_all(self, chat: Chat, answers: Mapping[int, tuple[str, Span]]) -> None:
        """Raise Rejected if the template drops something to train on, or a tool call of the context."""
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            if number in answers:
                text, (start, _) = answers[number]
                why = reasoning(message)
                if why is not None and (not isinstance(why, str) or why.strip() not in text[start:]):
                    raise Rejected(
                        "template",
                        f"message {number + 1}: {self._spec.what} drops the reasoning: write"
                        f" it into the content as <think>...</think>, remove it from the rows, or {ANOTHER}",
                    )
            if not message.get("tool_calls"):
                continue
            if number not in answers:
                text = self._render(chat, number + 1)
                start = _same(self._render(chat, number), text)
            if text_of(message).rpartition("</think>")[2].strip() not in text[start:]:
                raise Rejected(
                    "template",
                    f"message {number + 1}: {self._spec.what} drops the text beside the tool call:"
                    f" remove this text from the rows, or {ANOTHER}",
                )
            if (function := left_out(message, text[start:])) is not None:
                raise Rejected(
                    "template",
                    f"message {number + 1}: {self._spec.what} drops the tool call of"
                    f" {function!r}: remove rows with tool calls, or {ANOTHER}",
                )

    def _render(self, chat: Chat, stop: int, add_generation_prompt: bool = False) -> str:
        chosen = self._templates[chat.tools is not None]
        try:
            return chosen.render(chat.messages[:stop], add_generation_prompt, chat.tools)
        except Exception as error:  # a template is code: it may raise anything
            what = f"{self._spec.what} refuses the conversation"
            raise Rejected("template", f"{what}: {first_line(error)}; remove such rows, or {ANOTHER}") from None

    def _chat(self, parts: Sequence[tuple[Sequence[str], Sequence[Span]]]) -> list[Tokens]:
        """Return the tokens of a chat's texts; with shortening, without the texts of which nothing fits."""
        tokens, left_out = list[Tokens](), None
        for cuts, spans in parts:
            try:
                tokens.append(self._masked(cuts, spans))
            except Rejected as why:
                if why.reason != "too_long":
                    raise
                left_out = why
        if left_out and (not tokens or self.too_long == "reject"):
            raise left_out
        if left_out:
            tokens[-1] = replace(tokens[-1], shortened=True)
        return tokens[-1:] if self._last_turn_only else tokens

    def _masked(self, cuts: Sequence[str], spans: Sequence[Span]) -> Tokens:
        """Tokenise a text that is cut where answers begin, each cut alone, with the answers supervised.

        `spans` are the positions of the answers in the whole text.
        """
        before, *parts = cuts
        ids, written_at = [*self._encoder.ids(before)], []
        for (start, stop), part in zip(spans, parts, strict=True):
            # The model writes each token that begins in the answer, wherever the token ends.
            own, count = self._encoder.cut(part, stop - start, continues=start > 0)
            written = own[:count]
            if written and written[-1] in self._special:
                written.pop()  # the end of the turn
            self._require_own(written, bool(ids))
            written_at.append(slice(len(ids), len(ids) + count))
            ids += own
        shortened, most = False, self._max_length
        if self.too_long == "drop_turns" and (fitting := [part for part in written_at if part.stop <= most]):
            shortened = len(fitting) < len(written_at)
            ids = ids if len(ids) <= most else ids[: fitting[-1].stop]
            written_at = fitting[-1:] if self._last_turn_only else fitting
        supervised = np.zeros(len(ids), dtype=bool)
        for span in written_at:
            supervised[span] = True
        return self._checked(np.asarray(ids, dtype=np.int32), supervised, shortened)

    def _completion(self, example: Completion) -> Tokens:
        prompt = self._encoder.ids(example.prompt)
        answer = self._encoder.ids(example.completion, continues=bool(prompt))
        asked = [*self._begin([*prompt, *answer]), *prompt]
        self._require_own(answer, bool(asked))
        ids = np.asarray([*asked, *answer, *self._end(answer)], dtype=np.int32)
        return self._checked(ids, np.arange(len(ids)) >= len(asked))

    def _text(self, stretches: Sequence[str]) -> list[Tokens]:
        tokens: list[int] = []
        for stretch in stretches:
            tokens += self._encoder.ids(stretch, continues=bool(tokens))
        return self._pieces(np.asarray([*self._begin(tokens), *tokens, *self._end(tokens)], dtype=np.int32))

    def _given(self, row: Ids) -> list[Tokens]:
        ids = np.asarray(row.ids, dtype=np.int64)
        for name, numbers in (("labels", row.labels), ("attention_mask", row.mask)):
            if numbers is not None and len(numbers) != len(ids):
                raise Rejected("wrong_length", f"{len(numbers)} {name} for {len(ids)} input_ids")
        # What the mask leaves out is padding.
        kept = np.asarray(row.mask or np.ones(len(ids)), dtype=bool)
        for number in (int(ids[kept].min(initial=0)), int(ids[kept].max(initial=0))):
            if number < 0 or self._encoder.token_of(number) is None:
                raise Rejected("unknown_token", f"{self._spec.name} has no token {number}; use its tokenizer")
        if row.labels is None:
            return self._pieces(ids[kept].astype(np.int32))
        labels = np.asarray(row.labels, dtype=np.int64)
        if len(wrong := np.flatnonzero(kept & (labels != -100) & (labels != ids))):
            at = int(wrong[0])
            raise Rejected(
                "wrong_label",
                f"label {at + 1} is {labels[at]}, but must be -100 or the token there, {ids[at]}; do not shift labels",
            )
        return [self._checked(ids[kept].astype(np.int32), labels[kept] != -100)]

    def _pieces(self, ids: NDArray[np.int32]) -> list[Tokens]:
        # Each piece begins with the last token of the previous one, so each token but the first is predicted once.
        starts = range(0, max(len(ids) - 1, 1), self._max_length - 1)
        pieces = [ids[start : start + self._max_length] for start in starts]
        return [self._checked(piece, np.ones(len(piece), dtype=bool)) for piece in pieces]

    def _begin(self, ids: list[int]) -> list[int]:
        # No second begin token if the text has one already.
        bos = self._spec.bos_id
        return [bos] if self._spec.add_bos and bos is not None and ids[:1] != [bos] else []

    def _end(self, ids: list[int]) -> list[int]:
        return [self._spec.eos_id] if ids[-1:] != [self._spec.eos_id] else []

    def _require_own(self, written: list[int], asked: bool) -> None:
        """Raise Rejected if no token, apart from the end of the turn, has content.

        `asked`: a prompt precedes the tokens, so that the first of them is supervised too.
        """
        trained = written if asked else written[1:]
        if not self._says(written) or all(number in self._mute for number in trained):
            raise Rejected("no_supervised_token", "the answer has no token of its own to train on")

    def _says(self, written: list[int]) -> bool:
        return any(number not in self._mute and not self._encoder.is_blank(number) for number in written)

    def _checked(self, ids: NDArray[np.int32], supervised: NDArray[np.bool_], shortened: bool = False) -> Tokens:
        if len(ids) > (most := self._max_length):
            begun = supervised & (np.arange(len(ids)) < most) & (self.too_long == "cut")
            if not self._says(ids[begun].tolist()):
                raise Rejected("too_long", f"{len(ids)} tokens, more than data.max_length = {most}")
            ids, supervised, shortened = ids[:most], supervised[:most], True
        if (rows := self._spec.embeddings) is not None and (largest := int(ids.max(initial=0))) >= rows:
            token = self._encoder.token_of(largest)
            raise Rejected("no_embedding", f"token {token!r} (id {largest}) has no embedding; the model has {rows}")
        supervised[:1] = False
        if not supervised.any():
            raise Rejected("no_supervised_token", "the answer has no token of its own to train on")
        return Tokens(ids, supervised, shortened)


def _cuts(text: str, answers: Sequence[Span]) -> list[str]:
    return [text[low:high] for low, high in pairwise([0, *(start for start, _ in answers), len(text)])]


def _same(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(text), len(other)))


# The end of an answer in a chat template: a model that is trained on its chats stops there.


@dataclass(frozen=True)
class EndOfTurn:
    """Fixes the end of an answer: one token at which the model stops, and nothing after it."""

    # Special tokens at which the model stops.
    stops: tuple[str, ...]
    # Text that the template writes after the last message only, although that has ended (Phi-3: the end token).
    tail: str
    # Added to an answer without an end: the next role's token if the model stops at it (GLM-4.5), otherwise the end
    # token.
    stop: str
    # Like `stop`, after a tool call.
    call_stop: str
    # The token that ends a plain exchange; "" if there is none, or the template refuses the exchange.
    last: str
    # True if a plain exchange is changed.
    fixes: bool

    def __call__(self, text: str, calls: bool) -> str:
        """Fix the end of a conversation whose last message is the answer; `calls`: it calls tools."""
        text, stop = text.removesuffix(self.tail), self.call_stop if calls else self.stop
        return text.rstrip() + stop if stop and not text.rstrip().endswith(self.stops) else text


def end_of_turn(spec: TokenizerSpec, encoder: Encoder, tools: bool) -> EndOfTurn:
    template, form = spec.compiled(tools), spec.chat_form(tools)

    def written(messages: Sequence[dict[str, Any]]) -> str:
        try:
            return template.render(form(Chat(tuple(messages))).messages)
        except Exception:  # a template is code: it may raise anything
            return ""

    question: dict[str, Any]
    question, answer = ({**message} for message in EXCHANGE)
    call: list[dict[str, Any]] = [question, {**answer, "content": "", "tool_calls": [CALL]}]
    result = {"role": "tool", "content": "1", "tool_call_id": CALL["id"], "name": "f"}
    pairs = [(written(head), written([*head, more])) for head, more in (([question, answer], question), (call, result))]
    eos = encoder.token_of(spec.eos_id) or ""
    put = eos if encoder.ids(eos) == [spec.eos_id] else ""
    written_texts = "".join([spec.template(tools), *(text for pair in pairs for text in pair)])
    named = {encoder.token_of(number) or "" for number in encoder.special_ids()}
    special = tuple(sorted({eos, *(token for token in named if token in written_texts)} - {""}, key=len, reverse=True))
    any_special = "|".join(map(re.escape, special))

    def stop(text: str, longer: str) -> str:
        text = text.rstrip()
        match = re.compile(rf"\s*({any_special})").match(longer, len(text)) if longer.startswith(text) else None
        return match[0] if match and encoder.id_of(match[1]) in spec.ends else put

    # The tail that only the end of a conversation has: it follows the token that ends the answer in any case.
    parts, others = (re.split(f"({any_special})", text) for text in pairs[0])
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False)))
    shared, tail = "".join(parts[:same]), "".join(parts[same:])
    if not (all(pairs[0]) and shared.rstrip().endswith(special) and tail.strip()) or answer["content"] in tail:
        tail = ""
    plain, after = pairs[0][0], stop(*pairs[0])
    ended = plain.removesuffix(tail).rstrip()
    last = next((token for token in special if ended.endswith(token)), after.strip() if plain else "")
    fixes = bool(plain) and (bool(tail) or not ended.endswith(last))
    stops = tuple(token for token in special if token in (eos, last) or encoder.id_of(token) in spec.ends)
    return EndOfTurn(stops, tail, after, stop(*pairs[1]), last, fixes)


def turn_end(spec: TokenizerSpec) -> int | None:
    """Return the id of the token that ends an answer; None if the template renders no plain chat."""
    try:
        encoder = Encoder(spec.json, spec.name)
        return encoder.id_of(end_of_turn(spec, encoder, tools=False).last)
    except UserError:  # the tokenisation reports it
        return None


# The form in which a source's prompts and completions are trained: turns of a chat, or joined texts.


# Raised by one whenever the tokens of a format's rows change; formats that are not listed have 1.
RULES = {"text": 2, "prompt_completion": 3, "alpaca": 2, "sharegpt": 2}
# Formats whose messages may have tool calls.
WITH_TOOLS = ("messages", "prompt_completion", "sharegpt")
# Types of files in which an object has the keys of all rows.
COLUMNS_OF_STRUCTS = {"parquet", "arrow"}


def as_chat(source: Source, spec: TokenizerSpec) -> bool:
    """True if the prompts and completions of a source become turns of a chat."""
    if source.format != "prompt_completion":
        return False
    return spec.has_template if source.chat == "auto" else source.chat


def digest_inputs(source: Source, spec: TokenizerSpec, kinds: Collection[str]) -> dict[str, Any]:
    """Return what decides the tokens of a source beside its settings; `kinds` are the types of its files.

    Empty if the same rows have always had the same tokens.
    """
    inputs: dict[str, Any] = {}
    if source.format in RULES:
        inputs["rules"] = RULES[source.format]
    elif COLUMNS_OF_STRUCTS.intersection(kinds):
        inputs["rules"] = 2
    if source.format in WITH_TOOLS and COLUMNS_OF_STRUCTS.intersection(kinds):
        inputs["maps"] = "objects"
    if source.format == "prompt_completion":
        inputs["chat"] = as_chat(source, spec)
    chats = inputs.get("chat", source.format not in ("text", "tokens"))
    if chats and source.format in WITH_TOOLS:
        forms = [spec.chat_form(tools) for tools in (False, True)]
        if wanted := sorted({form.arguments for form in forms if form.arguments}):
            inputs["arguments"] = wanted[0]
        if any(form.wants_null for form in forms):
            inputs["calls_alone"] = "null"
        if any(name in spec.template(tools) for name in REASONING for tools in (False, True)):
            inputs["reasoning"] = "any name"
    ends = [end_of_turn(spec, Encoder(spec.json, spec.name), tools) for tools in (False, True)] if chats else []
    if any(end.fixes for end in ends):
        inputs["ends"] = [[end.tail, end.stop, end.call_stop] for end in ends]
    return inputs


def form_line(source: Source, spec: TokenizerSpec, setting: str) -> str | None:
    """Return a log line about the form of a source's rows; None if their format leaves no choice."""
    if source.format != "prompt_completion":
        return None
    if as_chat(source, spec):
        template = "its own chat template" if spec.has_template else "the plain chat template, because it has none"
        return f"{setting}: prompts and completions become turns of a chat; {spec.name} gets them in {template}"
    warning = f", but servers of {spec.name} apply one" if spec.has_template else f": {spec.name} has none"
    return f"{setting}: prompts and completions are joined without a chat template{warning}"
