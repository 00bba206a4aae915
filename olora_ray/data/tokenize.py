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

import copy
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError, first_line
from olora_ray.config.section import Source, is_auto
from olora_ray.config.tables import FORMATS
from olora_ray.data import columns
from olora_ray.data.chat_template import left_out, reasoning, text_of
from olora_ray.data.encoder import Encoder
from olora_ray.data.formats import format_named, to_example
from olora_ray.data.formats.chat import REASONING, SYSTEMS
from olora_ray.data.formats.format import (
    MAY_BE_CHATS,
    Chat,
    Completion,
    Example,
    Ids,
    Pair,
    Rated,
    Rejected,
    Text,
)
from olora_ray.data.text_files import DELIMITERS
from olora_ray.data.tokenizer_spec import CALL, TokenizerSpec, end_of_turn

Span = tuple[int, int]

# A document is tokenised in such parts, each up to the end of a word: tokenising takes 130 to 400 times their memory.
_STRETCH = re.compile(r".{1,524288}(?:(?<=\S)(?=\s)|\Z)|.{1,524288}", re.DOTALL)
# Stand for a content and a reasoning, to find out what a template writes around them.
MARK, WHY = "olora_content", "olora_reasoning"
THOUGHT = dict.fromkeys((*REASONING, "thought"), WHY)
# Switches reasoning on in most templates that can leave it out.
SWITCH = "{% set enable_thinking, thinking = true, true %}"


class Tokens(NamedTuple):
    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """Same length as `ids`."""
    shortened: bool = False
    """True if the example was too long: these are the tokens that `data.too_long` keeps."""
    segments: tuple[int, ...] = ()
    """Tokens of the chosen and of the rejected answer of a pair, each with the prompt; () for any other example."""
    rated: bool | None = None
    """True for an answer with a thumb up, False with a thumb down, None without a rating."""


class Begun(NamedTuple):
    """An example whose texts are known, but not tokenised yet."""

    example: Example
    answers: Sequence[tuple[str, int]]
    """Answers of a chat, each with the text that follows it, and the length of the answer itself."""
    texts: Sequence[str]
    """Texts to tokenise without offsets."""
    finish: Callable[[], list[Tokens]]
    """Returns the tokens, in several pieces for a long text; raises Rejected if the example cannot be used."""
    size: int
    """Characters, or tokens of a row that has them already."""
    marked: bool = False
    """True if the template has no place for the reasoning, so that it is written as <think>...</think>."""


class ExampleTokenizer:
    """Turns examples into tokens of at most `max_length`."""

    def __init__(
        self,
        spec: TokenizerSpec,
        max_length: int,
        last_turn_only: bool = False,
        too_long: str = "reject",
    ) -> None:
        """Load the tokenizer and compile the template; raise UserError if one of them is broken.

        `last_turn_only`: only the last answer of a chat is supervised, with `drop_turns` the last that fits.
        """
        self._spec = spec
        self._max_length = max_length
        self._last_turn_only = last_turn_only
        self._too_long = too_long
        self._encoder = Encoder(spec.json, spec.name)
        self._special = self._encoder.special_ids() | {spec.eos_id}
        self._mute = (self._encoder.id_of(spec.special_tokens.get("unk_token")), spec.eos_id)
        self._templates = [spec.compiled(tools) for tools in (False, True)]
        self._forms = [spec.chat_form(tools) for tools in (False, True)]
        self._ends = [end_of_turn(spec, self._encoder, tools) for tools in (False, True)]

    def __call__(self, example: Example) -> list[Tokens]:
        """Return the tokens of an example, in several pieces for a long text; raise Rejected if it cannot be used."""
        return self.begin(example).finish()

    def begin_row(self, row: Any, source: Source, number: int, notes: "Counter[str]") -> Begun:
        """Begin a raw row of source `number`, and note its columns that nothing reads; raise Rejected as `begin`."""
        example = to_example(source.format, row, source.fields, as_chat(source, self._spec), source)
        begun = self.begin(example)
        template = self._spec.template(isinstance(example, Chat) and example.tools is not None)
        columns.note_unread(notes, number, source, row, example, template)
        # A token has a few letters, so a far too long text is known without tokenising it in 200 times its memory.
        most = 1000 * self._max_length
        if begun.size > most and not isinstance(example, Text):
            texts = [*begun.texts, *(text for text, _ in begun.answers)]
            if any(len(text) > most for text in texts):
                raise Rejected(
                    "too_long",
                    f"more than {most:,} characters at data.max_length = {self._max_length}",
                )
        return begun

    def begin(self, example: Example) -> Begun:
        """Return an example with the texts to tokenise; raise Rejected if it cannot be used."""
        match example:
            case Chat():
                self._marked = False
                parts = []
                answers: list[tuple[str, int]] = []
                before = []
                size = 0
                for text, spans in self._parts(example):
                    # The text is cut where an answer begins.
                    starts = [start for start, _ in spans]
                    borders = itertools.pairwise([0, *starts, len(text)])
                    cuts = [text[low:high] for low, high in borders]
                    parts.append((cuts, spans))
                    before.append(cuts[0])
                    lengths = [stop - start for start, stop in spans]
                    answers += zip(cuts[1:], lengths, strict=True)
                    size += len(text)
                return Begun(
                    example, answers, before, lambda: self._chat(parts), size, self._marked
                )
            case Completion():
                texts = (example.prompt, example.completion)
                return Begun(
                    example, (), texts, lambda: [self._completion(example)], sum(map(len, texts))
                )
            case Text():
                stretches = _STRETCH.findall(example.text)
                first = stretches[:1]
                size = sum(map(len, first))
                return Begun(example, (), first, lambda: self._text(stretches), size)
            case Ids():
                return Begun(example, (), (), lambda: self._given(example), len(example.ids))
            case Rated():
                begun = self.begin(example.answer)
                return begun._replace(
                    example=example,
                    finish=lambda: [begun.finish()[-1]._replace(rated=example.up)],
                )
            case Pair():
                whole = copy.copy(self)  # the lengths of both answers are judged together
                whole._max_length = sys.maxsize
                both = [whole.begin(each) for each in example]
                answers = [answer for begun in both for answer in begun.answers]
                of_both = [text for begun in both for text in begun.texts]
                size = sum(begun.size for begun in both)
                return Begun(
                    example, answers, of_both, lambda: self._pair(both), size, both[0].marked
                )

    def ahead(self, begun: Sequence[Begun]) -> None:
        """Tokenise the texts of several examples in one batch, which takes less time; then finish each of them."""
        answers = [text for example in begun for text in example.answers]
        self._encoder.ahead(answers, [text for example in begun for text in example.texts])

    def prompt(self, text: str, chat: bool, system: str | None = None) -> tuple[int, ...]:
        """Return the tokens of a question, as they stand before its answer; raise UserError if the template refuses it.

        With `chat` it is the question of a chat, after the message `system` if there is one.
        """
        # An example needs an answer, whose tokens are cut off below. So any text that is not empty will do.
        example: Example = Completion(text, text)
        if chat:
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            if system:
                turns.insert(0, {"role": "system", "content": system})
            example = Chat(tuple(turns))
        try:
            (tokens,) = self(example)
        except Rejected as why:
            raise UserError(f"this prompt does not fit the chat template: {why.message}") from None
        return tuple(tokens.ids[: int(tokens.supervised.argmax())].tolist())

    def note(self, begun: Begun, tokens: Sequence[Tokens], notes: "Counter[str]") -> None:
        example = begun.example
        if isinstance(example, Text) or (isinstance(example, Ids) and example.labels is None):
            return
        if isinstance(example, Chat):
            notes["chats"] += 1
            if begun.marked:
                notes["marked"] += 1
            if len(tokens) > 1:
                notes["split"] += 1
                notes["split_tokens"] += sum(len(each.ids) for each in tokens)
                notes["whole_tokens"] += max(len(each.ids) for each in tokens)
        if 1 in [np.count_nonzero(each.supervised) for each in tokens]:
            notes["single"] += 1
        # A special token at the end teaches the model where to stop.
        last = {
            int(each.ids[each.supervised.nonzero()[0][-1]]) for each in tokens if not each.shortened
        }
        if not isinstance(example, Ids) and not last <= self._special:
            notes["unended"] += 1
        if True in [each.shortened for each in tokens]:
            notes[self._too_long] += 1

    def _parts(self, chat: Chat) -> list[tuple[str, list[Span]]]:
        chat = self._forms[chat.tools is not None](chat)
        trained = [
            number
            for number, message in enumerate(chat.messages)
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
        if self._last_turn_only and self._too_long != "drop_turns":
            trained = trained[-1:]
        last = len(chat.messages) - 1
        full = self._render(chat, last + 1)
        self._require_unusual(chat, full)
        answers = {
            number: self._answer(chat, number, full if number == last else None)
            for number in trained
        }
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

        `text` is the template's text, if it is rendered already. A server feeds the generation prompt to the model,
        even if the template's own text of the finished answer differs.
        """
        before = self._render(chat, number, add_generation_prompt=True)
        message = chat.messages[number]
        thought = reasoning(message)
        if not isinstance(thought, str | None):
            raise _refused(f"message {number + 1}: the reasoning is no text: remove such rows")
        thought = (thought or "").strip()
        if text is None:
            text = self._render(chat, number + 1)
        same = _same(before, text)
        end = self._ends[chat.tools is not None]
        answer = end(text, same, message)[same:]
        if before[same:].strip() or thought not in answer:
            answer = self._assembled(chat, number, before, thought)
        own = answer.replace(text_of(message) or "\0", "", 1)
        if sum(map(own.count, end.stops)) > 1:
            raise _refused(
                f"message {number + 1}: {self._spec.what} ends an answer in its middle: remove such rows"
            )
        whole = before + answer
        return whole, (len(before), len(whole.rstrip()))

    def _assembled(self, chat: Chat, number: int, before: str, thought: str) -> str:
        """Return the text of answer `number` after the prompt `before`, put together from its parts.

        The parts are this template's opening of the reasoning, the reasoning, the closing, and what follows.
        """
        given = chat.messages[number]
        message = {name: value for name, value in given.items() if name not in REASONING}
        asked = text_of(chat.messages[number - 1]) if number else ""

        def written(**changes: Any) -> str:
            last = {name: value for name, value in {**message, **changes}.items() if value != ()}
            if isinstance(given["content"], list) and isinstance(last["content"], str):
                last["content"] = [{"type": "text", "text": last["content"]}]
            with suppress(Rejected):
                text = self._render(
                    chat._replace(messages=(*chat.messages[:number], last)), number + 1
                )
                return self._ends[chat.tools is not None](text, _same(before, text), last)
            return ""

        def since(text: str, stop: int | None = None) -> str:
            # The text after the question: some templates write what precedes it in another way later.
            if asked and asked in text[:stop]:
                return text[text.rfind(asked, 0, stop) + len(asked) :]
            return text

        lead, close = _block(written, before, self._spec.template(chat.tools is not None))
        head, found, _ = written(content=MARK, tool_calls=()).partition(MARK)
        head = since(head)
        tail = since(before)
        prompt = before.rstrip()
        if message.get("tool_calls"):
            alone = close.removesuffix(_end(close, head))
            if alone.strip():
                close = alone
        key = close.strip()
        closed = bool(key) and prompt.endswith(key)
        if closed:
            opened = False
        elif lead is None:
            opened = prompt.endswith("<think>")
        else:
            opened = prompt.startswith(lead.rstrip())
        # A reasoning in the content that has another place in this template.
        if (
            thought
            and len(message) == len(given)
            and not closed
            and (opened or thought not in since(written()))
        ):
            message["content"] = text_of(message).rpartition("</think>")[2].strip()
        plain = written()
        own = since(plain, plain.rfind(text_of(message)))
        if thought in own:
            answer = _after(own, tail)
            if answer is not None:
                return answer
        rest = _after(head, tail)
        body = _after(own, head) if found else None
        if body is None and opened:  # the template writes a tool call in another way
            body = own[_shared(own, tail) :]
        elif rest is None and closed and key in head:
            rest = head.rpartition(key)[2]
        elif rest is None:
            other = head[_shared(head, tail) :]
            if closed or not other.strip():
                rest = other
        if closed and thought not in (body or ""):
            why = f"message {number + 1}: {self._spec.what} ends the reasoning in its generation prompt"
            raise _refused(
                f"{why}: remove the reasoning from the rows", f"a copy that begins with {SWITCH}"
            )
        if closed or not (opened or thought):
            start = rest
        elif opened and not thought and head.rstrip().endswith(key):
            # The template closes the reasoning itself.
            start = head[head.rindex(key) :]
        elif opened:
            start = thought + close
            body = body and body.lstrip()
        elif lead is None and rest is not None:
            start = f"<think>\n{thought}{close}"
            if key not in rest:
                start = rest + start
            self._marked = True
        else:
            start = lead and _after(since(lead), tail)
            if start:
                start += thought + close
        if start is None or body is None or (thought and not key):
            border = max(0, _same(before, plain) - 20)
            shown = [repr(text[border : border + 60]) for text in (before, plain)]
            why = f"message {number + 1} should start after {shown[0]}, but is {shown[1]}; remove such rows"
            raise _refused(f"{self._spec.what} does not continue its own generation prompt: {why}")
        return start + body

    def _require_unusual(self, chat: Chat, full: str) -> None:
        """Raise Rejected if the template drops an answer before the first question, or a later system message."""
        before = "system"
        for number, message in enumerate(chat.messages, 1):
            role = message["role"]
            unusual = role != "user" and (role in SYSTEMS) != (before in SYSTEMS)
            if unusual and text_of(message).rpartition("</think>")[2].strip() not in full:
                raise _refused(
                    f"message {number}: {self._spec.what} does not write a message from {role} here:"
                    " remove such rows"
                )
            before = role

    def _require_all(self, chat: Chat, answers: Mapping[int, tuple[str, Span]]) -> None:
        """Raise Rejected if the template drops a tool call, or the text beside one."""
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant" or not message.get("tool_calls"):
                continue
            if number in answers:
                text, (start, _) = answers[number]
            else:
                text = self._render(chat, number + 1)
                start = _same(self._render(chat, number), text)
            what = f"message {number + 1}: {self._spec.what} drops the"
            if text_of(message).rpartition("</think>")[2].strip() not in text[start:]:
                raise _refused(f"{what} text beside the tool call: remove this text from the rows")
            function = left_out(message, text[start:])
            if function is not None:
                raise _refused(f"{what} tool call of {function!r}: remove rows with tool calls")

    def _render(self, chat: Chat, stop: int, add_generation_prompt: bool = False) -> str:
        chosen = self._templates[chat.tools is not None]
        try:
            return chosen.render(chat.messages[:stop], add_generation_prompt, chat.tools)
        except Exception as error:  # a template is code: it may raise anything
            why = first_line(error)
            raise _refused(
                f"{self._spec.what} refuses the conversation: {why}; remove such rows"
            ) from None

    def _chat(self, parts: Sequence[tuple[Sequence[str], Sequence[Span]]]) -> list[Tokens]:
        """Return the tokens of a chat's texts; with shortening, without the texts of which nothing fits."""
        tokens = []
        too_long = None
        for cuts, spans in parts:
            try:
                tokens.append(self._masked(cuts, spans))
            except Rejected as why:
                if why.reason != "too_long":
                    raise
                too_long = why
        if too_long:
            if not tokens or self._too_long == "reject":
                raise too_long
            tokens[-1] = tokens[-1]._replace(shortened=True)
        if self._last_turn_only:
            return tokens[-1:]
        return tokens

    def _masked(self, cuts: Sequence[str], spans: Sequence[Span]) -> Tokens:
        """Tokenise a text that is cut where answers begin, each cut alone, with the answers supervised.

        `spans` are the positions of the answers in the whole text.
        """
        pieces = [self._encoder.ids(cuts[0])]
        length = len(pieces[0])
        written_at = []
        for (start, stop), part in zip(spans, cuts[1:], strict=True):
            # The model writes each token that begins in the answer, wherever the token ends.
            own, count = self._encoder.cut(part, stop - start, continues=start > 0)
            written = own[:count].tolist()
            if written and written[-1] in self._special:
                written.pop()  # the end of the turn
            self._require_own(written, length > 0)
            written_at.append(slice(length, length + count))
            pieces.append(own)
            length += len(own)
        ids = np.concatenate(pieces)
        shortened = False
        fitting = [part for part in written_at if part.stop <= self._max_length]
        if self._too_long == "drop_turns" and fitting:
            shortened = len(fitting) < len(written_at)
            if len(ids) > self._max_length:
                ids = ids[: fitting[-1].stop]
            if self._last_turn_only:
                fitting = fitting[-1:]
            written_at = fitting
        supervised = np.zeros(len(ids), dtype=bool)
        for span in written_at:
            supervised[span] = True
        return self._checked(ids, supervised, shortened)

    def _pair(self, both: Sequence[Begun]) -> list[Tokens]:
        chosen, rejected = [begun.finish()[-1] for begun in both]
        prompt = int(chosen.supervised.argmax())
        other = int(rejected.supervised.argmax())
        if not np.array_equal(chosen.ids[:prompt], rejected.ids[:other]):
            raise Rejected(
                "prompts_differ",
                "the chat template writes the prompt differently before the two answers",
            )
        segments = (len(chosen.ids), len(rejected.ids))
        if sum(segments) > self._max_length:
            parts = f"prompt {prompt} twice, chosen {segments[0] - prompt}, rejected {segments[1] - prompt}"
            raise Rejected(
                "pair_too_long",
                f"{sum(segments)} tokens ({parts}), more than data.max_length = {self._max_length}",
            )
        ids = np.concatenate([chosen.ids, rejected.ids])
        supervised = np.concatenate([chosen.supervised, rejected.supervised])
        return [Tokens(ids, supervised, segments=segments)]

    def _completion(self, example: Completion) -> Tokens:
        prompt = self._encoder.ids(example.prompt).tolist()
        answer = self._encoder.ids(example.completion, continues=bool(prompt)).tolist()
        asked = [*self._begin([*prompt, *answer]), *prompt]
        self._require_own(answer, bool(asked))
        ids = np.asarray([*asked, *answer, *self._end(answer)], dtype=np.int32)
        return self._checked(ids, np.arange(len(ids)) >= len(asked))

    def _text(self, stretches: Sequence[str]) -> list[Tokens]:
        tokens: list[int] = []
        for stretch in stretches:
            tokens += self._encoder.ids(stretch, continues=bool(tokens)).tolist()
        ids = [*self._begin(tokens), *tokens, *self._end(tokens)]
        pieces = self._pieces(np.asarray(ids, dtype=np.int32))
        if all((each.ids[each.supervised] == self._spec.eos_id).all() for each in pieces):
            raise Rejected(
                "no_supervised_token", "a text of one token: only the end token is left to train on"
            )
        return pieces

    def _given(self, row: Ids) -> list[Tokens]:
        ids = np.asarray(row.ids, dtype=np.int64)
        for name, numbers in (("labels", row.labels), ("attention_mask", row.mask)):
            if numbers is not None and len(numbers) != len(ids):
                raise Rejected("wrong_length", f"{len(numbers)} {name} for {len(ids)} input_ids")
        # What the mask leaves out is padding.
        kept = np.asarray(row.mask or np.ones(len(ids)), dtype=bool)
        used = ids[kept]
        for number in (int(used.min(initial=0)), int(used.max(initial=0))):
            if number < 0 or self._encoder.token_of(number) is None:
                raise Rejected(
                    "unknown_token", f"{self._spec.name} has no token {number}; use its tokenizer"
                )
        if row.labels is None:
            return self._pieces(used.astype(np.int32))
        labels = np.asarray(row.labels, dtype=np.int64)
        wrong = np.flatnonzero(kept & (labels != -100) & (labels != ids))
        if len(wrong):
            at = int(wrong[0])
            raise Rejected(
                "wrong_label",
                f"label {at + 1} is {labels[at]}, but must be -100 or the token there, {ids[at]}; do not shift labels",
            )
        return [self._checked(used.astype(np.int32), labels[kept] != -100)]

    def _pieces(self, ids: NDArray[np.int32]) -> list[Tokens]:
        # Each piece begins with the last token of the previous one, so each token but the first is predicted once.
        starts = range(0, max(len(ids) - 1, 1), self._max_length - 1)
        pieces = [ids[start : start + self._max_length] for start in starts]
        return [self._checked(piece, np.ones(len(piece), dtype=bool)) for piece in pieces]

    def _begin(self, ids: list[int]) -> list[int]:
        # No second begin token if the text has one already.
        bos = self._spec.bos_id
        if not self._spec.add_bos or bos is None or ids[:1] == [bos]:
            return []
        return [bos]

    def _end(self, ids: list[int]) -> list[int]:
        said = (number for number in reversed(ids) if not self._encoder.is_blank(number))
        if next(said, None) == self._spec.eos_id:
            return []
        return [self._spec.eos_id]

    def _require_own(self, written: list[int], asked: bool) -> None:
        """Raise Rejected if no token, apart from the end of the turn, has content.

        `asked`: a prompt precedes the tokens, so that the first of them is supervised too.
        """
        trained = written if asked else written[1:]
        if not self._says(written) or all(number in self._mute for number in trained):
            raise Rejected("no_supervised_token", "the answer has no token of its own to train on")

    def _says(self, written: list[int]) -> bool:
        return any(
            number not in self._mute and not self._encoder.is_blank(number) for number in written
        )

    def _checked(
        self, ids: NDArray[np.int32], supervised: NDArray[np.bool_], shortened: bool = False
    ) -> Tokens:
        most = self._max_length
        if len(ids) > most:
            begun = ids[:most][supervised[:most]].tolist()
            if self._too_long != "cut" or not self._says(begun):
                raise Rejected("too_long", f"{len(ids)} tokens, more than data.max_length = {most}")
            ids = ids[:most]
            supervised = supervised[:most]
            shortened = True
        largest = int(ids.max(initial=0))
        rows = self._spec.embeddings
        if rows is not None and largest >= rows:
            token = self._encoder.token_of(largest)
            raise Rejected(
                "no_embedding",
                f"token {token!r} (id {largest}) has no embedding; the model has {rows}",
            )
        supervised[:1] = False
        if not np.count_nonzero(supervised):
            raise Rejected("no_supervised_token", "the answer has no token of its own to train on")
        return Tokens(ids, supervised, shortened)


def _refused(why: str, other: str = "another template, such as chatml-tools") -> Rejected:
    return Rejected("template", f"{why}, or set data.chat_template to {other}")


def _after(text: str, start: str) -> str | None:
    """Return the text after `start`, whatever blanks there are in it; None if it does not begin so."""
    same = _same(text, start)
    wanted = "".join(start[same:].split())
    text = text[same:]
    match = re.match(r"\s*".join(map(re.escape, ["", *wanted])), text)
    if match is None:
        return None
    text = text[match.end() :]
    if wanted and start[-1:].isspace():
        text = text.lstrip()
    return text


def _block(written: Callable[..., str], before: str, source: str) -> tuple[str | None, str]:
    """Return the text of a conversation up to the reasoning of its last answer, and the text that closes the reasoning.

    `written` returns the text of the conversation with changes of its last message. Some templates write a reasoning
    only beside a tool call, or as a part of the content. If none is written, the text up to it is None.
    """
    parts = [{"type": "thinking", "thinking": WHY}, {"type": "text", "text": MARK}]
    plain = {"content": MARK, "tool_calls": ()}
    call = {"content": "", "tool_calls": [CALL]}
    ways: list[dict[str, Any]] = []
    if any(name in source for name in THOUGHT):  # most do not, and rendering takes its time
        ways = [plain | THOUGHT, call | THOUGHT, plain | {"content": parts}]
    for way in ways:
        lead, found, rest = written(**way).partition(WHY)
        if not found or lead.endswith(("'", '"')):  # a list is written as it is
            continue
        if MARK in rest:
            return lead, rest[: rest.index(MARK)]
        without = written(**{name: value for name, value in way.items() if value != WHY})
        close = rest.removesuffix(_end(rest, without))
        if not close and before.startswith(lead):
            close = before[len(lead) :]
        return lead, close
    return None, "\n</think>\n\n"


def _end(text: str, other: str) -> str:
    """Return the common end of two texts, without a part of a tag and blanks at its start."""
    same = _same(text[::-1], other[::-1])
    return re.sub(r"\A(?:[^<\[]*?[>\]])?\s*", "", text[len(text) - same :])


def _shared(text: str, other: str) -> int:
    same = _same(text, other)
    tag = text.rfind("<", 0, same)
    if tag > text.rfind(">", 0, same):  # without a part of a tag
        return tag
    return same


def _same(text: str, other: str) -> int:
    length = min(len(text), len(other))
    if text[:length] == other[:length]:  # almost always, and the search takes its time
        return length
    return next(index for index in range(length) if text[index] != other[index])


# The form in which a source's prompts and completions are trained: turns of a chat, or joined texts.


# Types of files in which an object has the keys of all rows.
COLUMNS_OF_STRUCTS = {"parquet", "arrow"}


def as_chat(source: Source, spec: TokenizerSpec) -> bool:
    """True if the prompts and completions of a source become turns of a chat."""
    if format_named(source.format).makes not in MAY_BE_CHATS:
        return False
    return spec.has_template if is_auto(source.chat) else source.chat


def asks_in_chats(source: Source, spec: TokenizerSpec) -> bool:
    """True if the model answers in chats after a training on this source."""
    format = format_named(source.format)
    if format.makes == "ids":
        return spec.has_template
    return format.is_chat(as_chat(source, spec))


def digest_inputs(source: Source, spec: TokenizerSpec, kinds: Collection[str]) -> dict[str, Any]:
    """Return what decides the tokens of a source beside its settings; `kinds` are the types of its files.

    Empty if the same rows have always had the same tokens.
    """
    inputs: dict[str, Any] = {}
    format = format_named(source.format)
    structs = COLUMNS_OF_STRUCTS.intersection(kinds)
    plugin = FORMATS.plugin(source.format)
    if plugin:
        inputs["plugin"] = plugin.identity()
    # Beside Parquet, rules 1 and 2 are the same.
    if structs or format.rules > 1:
        inputs["rules"] = max(2, format.rules)
    if not DELIMITERS.keys().isdisjoint(kinds):
        inputs["cells"] = "nan is empty"
    if format.tools and structs:
        inputs["maps"] = "objects"
    if format.makes in MAY_BE_CHATS:
        inputs["chat"] = as_chat(source, spec)
    for name in ("roles", "labels", "system"):
        if getattr(source, name):
            inputs[name] = getattr(source, name)
    if source.markup not in ("auto", "none"):
        inputs["markup"] = source.markup
    chats = format.is_chat(as_chat(source, spec))
    if chats and format.tools:
        forms = [spec.chat_form(tools) for tools in (False, True)]
        wanted = sorted({form.arguments for form in forms if form.arguments})
        if wanted:
            inputs["arguments"] = wanted[0]
        if any(form.wants_null for form in forms):
            inputs["calls_alone"] = "null"
        templates = f"{spec.template(False)}\n{spec.template(True)}"
        if any(name in templates for name in REASONING):
            inputs["reasoning"] = "any name"
    if chats:
        encoder = Encoder(spec.json, spec.name)
        ends = [end_of_turn(spec, encoder, tools) for tools in (False, True)]
        if any(end.fixes for end in ends):
            inputs["ends"] = [[end.tail, end.stop, end.call_stop] for end in ends]
            for texts, end in zip(inputs["ends"], ends, strict=True):
                if end.cuts:
                    texts.append(end.last)
    return inputs


def form_line(source: Source, spec: TokenizerSpec, setting: str) -> str | None:
    """Return a log line about the form of a source's rows; None if their format leaves no choice."""
    if format_named(source.format).makes not in MAY_BE_CHATS:
        return None
    if as_chat(source, spec):
        template = "its own chat template"
        if not spec.has_template:
            template = "the plain chat template, because it has none"
        return f"{setting}: prompts and completions become turns of a chat; {spec.name} gets them in {template}"
    line = f"{setting}: prompts and completions are joined without a chat template"
    if spec.has_template:
        return f"{line}, but servers of {spec.name} apply one"
    return f"{line}: {spec.name} has none"
