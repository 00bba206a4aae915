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

What has more than `max_length` tokens is rejected or shortened (`data.too_long`). Shortened, it keeps its beginning:
all of its tokens up to `max_length`, as in TRL and Axolotl, or those up to the end of the last answer that fits.
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
from olora_ray.data.formats import REASONING, Chat, Completion, Example, Rejected, Text
from olora_ray.data.tokenizer_spec import TokenizerSpec

Span = tuple[int, int]

ANOTHER = "name another template in data.chat_template"
CALL: dict[str, Any] = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_STRETCH = re.compile(r".{1,524288}(?:(?<=\S)(?=\s)|\Z)|.{1,524288}", re.DOTALL)
"""What of a document is tokenised at once, up to the end of a word: that takes 130 to 400 times its memory."""
_OPENED, _OPENED_ALSO = re.compile(r"<think>\s*\Z"), re.compile(r"\A<think>\s*")


@dataclass(frozen=True)
class Tokens:
    """One example, ready to be packed."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """Same length as `ids`."""
    shortened: bool = False
    """True if the example was too long, and this is what `data.too_long` leaves of it."""


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

    def __init__(
        self, spec: TokenizerSpec, max_length: int, last_turn_only: bool = False, too_long: str = "reject"
    ) -> None:
        """Load the tokenizer and compile the template; raises UserError for one that is broken.

        `last_turn_only`: of a chat only the last answer is trained on, with `drop_turns` the last that fits.
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
                return Begun(example, answers, before, lambda: self._chat(parts))
            case Completion():
                texts = (example.prompt, example.completion)
                return Begun(example, (), texts, lambda: [self._completion(example)])
            case Text():
                stretches = _STRETCH.findall(example.text)
                return Begun(example, (), stretches[:1], lambda: self._text(stretches))

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
        # The template shows an answer differently once the conversation continues (it drops the reasoning
        # of earlier turns, say): what the model is asked to write then exists only at the end of a prefix.
        return [(text, [span]) for text, span in answers.values()]

    def _answer(self, chat: Chat, number: int, text: str | None) -> tuple[str, Span]:
        """The text up to the end of answer `number`, and where the answer lies in it.

        `text` is that of the template, if it is there already.
        """
        before = self._render(chat, number, add_generation_prompt=True)
        text = self._render(chat, number + 1) if text is None else text
        text = self._ends[chat.tools is not None](text, bool(chat.messages[number].get("tool_calls")))
        if not text.startswith(before):
            text = before + self._continued(chat, number, before, text)
        return text, (len(before), len(text.rstrip()))

    def _continued(self, chat: Chat, number: int, before: str, text: str) -> str:
        """What continues the generation prompt `before` where the template's own `text` of an answer does not.

        A server feeds `before`, whatever the template makes of the conversation later.
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
        # The prompt begins otherwise: a system message that stands in the last of the user's alone (Mistral).
        asked, answer = (text_of(chat.messages[each]) for each in (number - 1, number))
        tail = before[before.rfind(asked) :] if asked and asked in before else ""
        place = text.rfind(tail, 0, text.rfind(answer)) if tail else -1
        if place >= 0:
            return text[place + len(tail) :]
        raise Rejected(
            "template",
            f"{self._spec.what} does not continue its own generation prompt: message"
            f" {number + 1} should start after {before[max(0, same - 20) :][:60]!r}, but is"
            f" {text[max(0, same - 20) :][:60]!r}: take such rows out, or {ANOTHER}",
        )

    def _require_all(self, chat: Chat, answers: Mapping[int, tuple[str, Span]]) -> None:
        """Raise Rejected where the template leaves out what is to be trained, or a tool call of the context."""
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            if number in answers:
                text, (start, _) = answers[number]
                why = reasoning(message)
                if why is not None and (not isinstance(why, str) or why.strip() not in text[start:]):
                    raise Rejected(
                        "template",
                        f"message {number + 1}: {self._spec.what} leaves the reasoning out: write"
                        f" it into the content as <think>...</think>, take it out of the rows, or {ANOTHER}",
                    )
            if not message.get("tool_calls"):
                continue
            if number not in answers:
                text = self._render(chat, number + 1)
                start = _same(self._render(chat, number), text)
            if text_of(message).rpartition("</think>")[2].strip() not in text[start:]:
                raise Rejected(
                    "template",
                    f"message {number + 1}: {self._spec.what} leaves the text beside the tool call"
                    f" out: take it out of the rows, or {ANOTHER}",
                )
            if (function := left_out(message, text[start:])) is not None:
                raise Rejected(
                    "template",
                    f"message {number + 1}: {self._spec.what} leaves the tool call out (of"
                    f" {function!r}): take rows without tool calls, or {ANOTHER}",
                )

    def _render(self, chat: Chat, stop: int, add_generation_prompt: bool = False) -> str:
        chosen = self._templates[chat.tools is not None]
        try:
            return chosen.render(chat.messages[:stop], add_generation_prompt, chat.tools)
        except Exception as error:  # a template is code: it may raise anything
            what = f"{self._spec.what} refuses the conversation"
            raise Rejected("template", f"{what}: {first_line(error)}: take such rows out, or {ANOTHER}") from None

    def _chat(self, parts: Sequence[tuple[Sequence[str], Sequence[Span]]]) -> list[Tokens]:
        """The tokens of the texts of a chat; where too long ones are shortened, without those of which nothing fits."""
        found, left_out = list[Tokens](), None
        for cuts, spans in parts:
            try:
                found.append(self._masked(cuts, spans))
            except Rejected as why:
                if why.reason != "too_long":
                    raise
                left_out = why
        if left_out and (not found or self.too_long == "reject"):
            raise left_out
        if left_out:
            found[-1] = replace(found[-1], shortened=True)
        return found[-1:] if self._last_turn_only else found

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
        shortened, most = False, self._max_length
        if self.too_long == "drop_turns" and (fitting := [part for part in written_at if part.stop <= most]):
            shortened = len(fitting) < len(written_at)
            ids = ids if len(ids) <= most else ids[: fitting[-1].stop]
            written_at = fitting[-1:] if self._last_turn_only else fitting
        supervised = np.zeros(len(ids), dtype=bool)
        for place in written_at:
            supervised[place] = True
        return self._checked(np.asarray(ids, dtype=np.int32), supervised, shortened)

    def _completion(self, example: Completion) -> Tokens:
        prompt = self._encoder.ids(example.prompt)
        answer = self._encoder.ids(example.completion, continues=bool(prompt))
        asked = [*self._begin([*prompt, *answer]), *prompt]
        self._require_own(answer, bool(asked))
        ids = np.asarray([*asked, *answer, *self._end(answer)], dtype=np.int32)
        return self._checked(ids, np.arange(len(ids)) >= len(asked))

    def _text(self, stretches: Sequence[str]) -> list[Tokens]:
        found: list[int] = []
        for stretch in stretches:
            found += self._encoder.ids(stretch, continues=bool(found))
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
        trained = written if asked else written[1:]
        if not self._says(written) or all(number in self._mute for number in trained):
            raise Rejected("no_supervised_token", "no token of the answer itself is left to train on")

    def _says(self, written: list[int]) -> bool:
        """Whether one of the tokens of an answer says anything."""
        return any(number not in self._mute and not self._encoder.is_blank(number) for number in written)

    def _checked(self, ids: NDArray[np.int32], supervised: NDArray[np.bool_], shortened: bool = False) -> Tokens:
        if len(ids) > (most := self._max_length):
            begun = supervised & (np.arange(len(ids)) < most) & (self.too_long == "cut")
            if not self._says(ids[begun].tolist()):
                raise Rejected("too_long", f"{len(ids)} tokens, more than data.max_length = {most}")
            ids, supervised, shortened = ids[:most], supervised[:most], True
        if (rows := self._spec.embeddings) is not None and (largest := int(ids.max(initial=0))) >= rows:
            token = self._encoder.token_of(largest)
            raise Rejected("no_embedding", f"the token {token!r} ({largest}) is beyond the model's {rows} embeddings")
        supervised[:1] = False
        if not supervised.any():
            raise Rejected("no_supervised_token", "no token of the answer itself is left to train on")
        return Tokens(ids, supervised, shortened)


def _cuts(text: str, answers: Sequence[Span]) -> list[str]:
    """What is before the first answer, and each answer with what follows it."""
    return [text[low:high] for low, high in pairwise([0, *(start for start, _ in answers), len(text)])]


def _same(text: str, other: str) -> int:
    """How many characters two texts begin with together."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, another) in pairs if one != another), min(len(text), len(other)))


# How a chat template ends an answer: what a model that is trained on its chats stops with.


@dataclass(frozen=True)
class EndOfTurn:
    """Mends the end of an answer, so that it has a token at which the model stops, and nothing after it."""

    stops: tuple[str, ...]
    """The special tokens at which the model stops."""
    tail: str
    """What it writes after the last message alone, though that has ended (Phi-3: the end token)."""
    stop: str
    """What is put after an answer that does not end: the next role's token, where the model stops at it (GLM-4.5), else
    the end token."""
    call_stop: str
    """The same after a tool call."""
    last: str
    """The token that ends a plain exchange; "" if there is none, or the template refuses one."""
    mends: bool
    """True if a plain exchange is mended."""

    def __call__(self, text: str, calls: bool) -> str:
        """The text of a conversation whose last message is the answer, with its end; `calls`: it calls tools."""
        text, stop = text.removesuffix(self.tail), self.call_stop if calls else self.stop
        return text.rstrip() + stop if stop and not text.rstrip().endswith(self.stops) else text


def end_of_turn(spec: TokenizerSpec, encoder: Encoder, tools: bool) -> EndOfTurn:
    """How the template for conversations with tools, or without, ends an answer."""
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
    there = "".join([spec.template(tools), *(text for pair in pairs for text in pair)])
    named = {encoder.token_of(number) or "" for number in encoder.special_ids()}
    special = tuple(sorted({eos, *(token for token in named if token in there)} - {""}, key=len, reverse=True))
    any_special = "|".join(map(re.escape, special))

    def stop(text: str, longer: str) -> str:
        text = text.rstrip()
        found = re.compile(rf"\s*({any_special})").match(longer, len(text)) if longer.startswith(text) else None
        return found[0] if found and encoder.id_of(found[1]) in spec.ends else put

    # What the end of the conversation alone is written with: after the token that ends the answer in any case.
    parts, others = (re.split(f"({any_special})", text) for text in pairs[0])
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False)))
    shared, tail = "".join(parts[:same]), "".join(parts[same:])
    if not (all(pairs[0]) and shared.rstrip().endswith(special) and tail.strip()) or answer["content"] in tail:
        tail = ""
    plain, after = pairs[0][0], stop(*pairs[0])
    ended = plain.removesuffix(tail).rstrip()
    last = next((token for token in special if ended.endswith(token)), after.strip() if plain else "")
    mends = bool(plain) and (bool(tail) or not ended.endswith(last))
    stops = tuple(token for token in special if token in (eos, last) or encoder.id_of(token) in spec.ends)
    return EndOfTurn(stops, tail, after, stop(*pairs[1]), last, mends)


def turn_end(spec: TokenizerSpec) -> int | None:
    """The id of the token that ends an answer; None where the template renders no plain chat."""
    try:
        encoder = Encoder(spec.json, spec.name)
        return encoder.id_of(end_of_turn(spec, encoder, tools=False).last)
    except UserError:  # whoever makes tokens with it is told
        return None


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
    chats = found.get("chat", source.format != "text")
    if chats and source.format in WITH_TOOLS:
        forms = [spec.chat_form(tools) for tools in (False, True)]
        if wanted := sorted({form.arguments for form in forms if form.arguments}):
            found["arguments"] = wanted[0]
        if any(form.wants_null for form in forms):
            found["calls_alone"] = "null"
        if any(name in spec.template(tools) for name in REASONING for tools in (False, True)):
            found["reasoning"] = "any name"
    ends = [end_of_turn(spec, Encoder(spec.json, spec.name), tools) for tools in (False, True)] if chats else []
    if any(end.mends for end in ends):
        found["ends"] = [[end.tail, end.stop, end.call_stop] for end in ends]
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
