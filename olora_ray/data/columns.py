"""Columns of rows, and keys of messages, that nothing reads: which of them stop a run.

A row with a chat, or with a question and its answer, is complete: what nothing reads is left out, and one line says so.
A column stops the run if it says that its row is not for plain training, or changes what the row means: preferences,
labels, masks, choices, images and sounds; beside a question, a second answer, or a long text on which the answer may
rest; beside a text, a question, an answer or a class. The user answers in the `fields` of the source: a field for the
column, or `none`.
"""

import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import yaml

from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.section import Source
from olora_ray.data.formats import columns_of, format_named, own_formats, to_example
from olora_ray.data.formats.chat import REASONING
from olora_ray.data.formats.format import (
    EMPTY,
    FEEDBACK,
    NONE,
    Chat,
    Example,
    Rejected,
    one_line,
    type_name,
)
from olora_ray.data.formats.prompt_completion import COMPLETION
from olora_ray.data.formats.text import TEXTS

WORD = re.compile(r"[^\W\d_]+")
DECIDES = {
    *WORD.findall("label mask weight train kto thumb chosen rejected preferred"),
    *WORD.findall("image img picture photo screenshot pixel audio video speech"),
}
"""Words of names of columns that decide what is trained, whatever their values are."""
PREFERENCES = {*WORD.findall("chosen rejected preferred train")}
"""Words of names of columns beside two answers, such as their scores and `in_gsm8k_train`, that decide nothing."""
CHOICES = {*WORD.findall("option choice candidate distractor ending")}
"""Words of names of columns to which an answer may refer by a letter or number."""
CLASSES = {*WORD.findall("label class category sentiment emotion intent")}
"""Words of names of columns that may be the answer to a text."""
ANSWERS = {COMPLETION.name, *COMPLETION.other_names}
"""Names of columns with an answer."""
MEDIA = re.compile(
    r".*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|wav|mp3|flac|ogg|m4a|mp4|mov|avi|webm)\b", re.IGNORECASE
)
KNOWN = {
    name
    for format in own_formats()
    for field in format.fields
    if format.makes != "ids"
    for name in (field.name, *field.other_names, *field.last_names)
} - {field.name for format in own_formats() for field in format.fields if field.in_turn}
"""Names of fields in this and other tools."""
WRITTEN = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "olora_ray"}
"""Columns that a tokenizer writes beside a text, and what `olora-ray follow --rows` notes about a row."""
LEFT = "left\t"
"""Beginning of the note of a column or key that is left out."""
LONG = 20
"""Words of a text above which an answer may rest on it."""


def decides(format: str, name: str, value: Any) -> bool:
    """Return whether a column or key that nothing reads decides what a row means, by its name or by a file it names."""
    words = _words(name)
    known = format_named(format)
    if words[-1:] in (("id",), ("count",), ("date",)):
        return False
    deciding = DECIDES
    if known.makes == "text":
        deciding = DECIDES | CLASSES
    elif known.makes in FEEDBACK:
        deciding = DECIDES - PREFERENCES
    elif not known.has_turns:
        deciding = DECIDES | CHOICES
        of_answer = isinstance(value, str) and name.lower().strip() in ANSWERS
        if of_answer or re.fullmatch("[A-Ea-e]", name):  # the columns of C-Eval's choices
            return True
    return not deciding.isdisjoint(words) or any(map(MEDIA.match, _texts(value)))


def note_unread(
    notes: "Counter[str]",
    number: int,
    source: Source,
    row: Any,
    example: Example,
    template: str = "",
) -> None:
    """Note the columns of a row, and the keys of its messages, that nothing reads, also those that decide nothing."""
    for kind, name, value in _unread(source, row, example, template):
        note = f"{LEFT}{kind} {name}"
        if decides(source.format, name, value):
            note = f"unread\t{number}\t{kind}\t{json.dumps(name)}\t2\t"
            if any(other.startswith(note) for other in notes):
                continue
            note += excerpt(value)
        elif kind == "key" and not template:
            continue
        if note in notes or len(notes) < 100:
            notes[note] += 1


def left_out(notes: Mapping[str, int]) -> str:
    """Return the names of columns and keys that no source maps and nothing reads; "" without any."""
    return ", ".join(note.removeprefix(LEFT) for note in notes if note.startswith(LEFT))


def _unread(
    source: Source, row: Any, example: Example, template: str
) -> Iterator[tuple[str, str, Any]]:
    used = _used(source.format, *source.fields.items())
    if isinstance(row, Mapping):
        for column, value in row.items():
            name = str(column)
            known = name in used or name in source.fields or name in WRITTEN
            if not known and value not in EMPTY:
                yield "column", name, value
    if isinstance(example, Chat):
        read = _read_keys(template)
        for message in example.messages:
            for key, value in message.items():
                if key not in read and key not in source.fields and value not in EMPTY:
                    yield "key", key, value


@lru_cache(64)
def _used(format: str, *fields: tuple[str, str]) -> frozenset[str]:
    return frozenset(columns_of(format, dict(fields)))


@lru_cache(8)
def _read_keys(template: str) -> frozenset[str]:
    named = re.findall(r"(?<=[.'\"])\w+", template)
    return frozenset({"role", "content", "tool_calls", "weight", *REASONING, *named})


@lru_cache(2**12)
def _words(name: str) -> tuple[str, ...]:
    words = WORD.findall(
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    )
    return tuple(word if word == "class" else word.removesuffix("s") for word in words)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        text = value.strip()
        if text:
            yield text
        return
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return
    for part in value:
        yield from _texts(part)


def unresolved_error(
    notes: Mapping[str, int], sources: Mapping[int, Source], setting: str
) -> UserError | None:
    """Return the error for the first column or key that decides; None if there is none.

    The notes of a store may be older than an answer, and than this version, which asks less.
    """
    for note in notes:
        if not note.startswith("unread\t"):
            continue
        _, place, kind, quoted, _, example = note.split("\t")
        name = json.loads(quoted)
        source = sources[int(place)]
        if name not in source.fields and decides(source.format, name, [example]):
            where = f"{setting}.{place}"
            return UserError(
                f"{where}: {kind} {name!r} (such as {example}) may decide what its row means, and {source.format} rows"
                f" do not use it; map it to a field, or set {name}: none in {where}.fields to train without it"
            )
    return None


# The questions of the first look.


class Unclear(UserError):
    """Rows whose meaning a person must say, with columns that could be question and answer."""

    def __init__(self, message: str, asked: str = "") -> None:
        super().__init__(message)
        self.asked = asked or message
        """The same for a terminal that asks for the columns: a line for each, and no arguments."""


def require_clear(where: str, source: Source, read: Sequence[tuple[Any, Example]]) -> None:
    """Raise the question that rows in a known format leave open, if there is one.

    `read` are rows with their examples, `where` is the setting of the source.
    """
    known = format_named(source.format)
    rows = [row for row, _ in read]
    left: dict[str, list[Any]] = {}
    for row, example in read:
        for kind, name, value in _unread(source, row, example, ""):
            if decides(source.format, name, value):
                of_class = known.makes == "text" and not CLASSES.isdisjoint(_words(name))
                if of_class and isinstance(value, str | int):
                    raise _of_class(where, source, name, rows)
                why = (
                    f"{kind} {name!r} may decide what its row means (set {name}: none in {where}.fields to train"
                    " without it)"
                )
                if known.has_turns or known.makes in FEEDBACK:
                    raise Unclear(
                        f"{where}: {why}: what does it mean? {', '.join(_described(rows))}"
                    )
                raise which(where, why, rows)
            if kind == "column" and not _repeats(value, row, source):
                left.setdefault(name, []).append(value)
    if known.makes == "text":
        for name, values in left.items():
            called = name.lower().strip()
            if called != "title" and (called in KNOWN or words_of(values) > 2):
                raise which(where, f"column {name!r} stands beside a text", rows)
    # A format of a package has fields of its own, so no line can be proposed.
    elif known in own_formats() and known.makes not in ("ids", *FEEDBACK) and not known.has_turns:
        _require_context(where, source, left, rows)


def _repeats(value: Any, row: Any, source: Source) -> bool:
    # A copy of what is read, or all texts joined beside a question.
    used = _used(source.format, *source.fields.items())
    seen = [*_texts([row.get(column) for column in used])]
    texts = [*_texts(value)]
    joined = "\n".join(texts)
    return {*texts} <= {*seen} or (len(seen) > 1 and all(text in joined for text in seen))


def _of_class(where: str, source: Source, name: str, rows: Sequence[Mapping[Any, Any]]) -> Unclear:
    text = source.fields.get("text", "text")
    return _either(
        where,
        f"is column {name!r} the answer to the text? With labels: {{COLUMN: [NAME, NAME]}} its numbers have names.",
        rows,
        {"instruction": text, "output": name},
        {**source.fields, name: NONE},
    )


def _require_context(
    where: str, source: Source, left: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[Any, Any]]
) -> None:
    needed = format_named(source.format).needed
    question, answer = [source.fields.get(name, name) for name in needed]
    most = max(LONG, words_of([row.get(question) for row in rows]))
    long = []
    for name, values in left.items():
        words = words_of(values)
        if words > most or (words and name.lower().strip() in TEXTS):
            long.append(name)
    if not long:
        return
    if len(long) > 1 or "input" in source.fields or not isinstance(left[long[0]][0], str):
        names = " and ".join(map(repr, long))
        raise which(where, f"the answer may rest on {names}, and no field reads it", rows)
    # An alpaca row has a field for it, a prompt with its completion has none.
    others = {name: source.fields[name] for name in source.fields if name not in needed}
    raise _either(
        where,
        f"does the answer rest on column {long[0]!r}?",
        rows,
        {"instruction": question, "output": answer, "input": long[0], **others},
        {**source.fields, long[0]: NONE},
    )


def of_pairs(where: str, source: Source, rows: Sequence[Mapping[Any, Any]]) -> UserError | None:
    """Return why rows with rejected answers could not be read as pairs; None if they have none.

    `rows` were read in another format.
    """
    for name in rows[0] if rows else ():
        if "rejected" not in _words(str(name)) or name in source.fields:
            continue
        if all(row.get(name) in EMPTY for row in rows):
            line = fields(where, {**source.fields, str(name): NONE})
            return UserError(
                f"{where}: column {str(name)!r} has no values; set {line} to train on the chosen answers alone"
            )
    for row in rows:
        if {"chosen", "rejected"} <= row.keys() - source.fields.keys():
            try:
                to_example("preference", row, {}, as_chat=True)
            except Rejected as why:
                return UserError(
                    f"{where}: most of the rows read are no pairs, such as one with {why}"
                )
    return None


def _either(
    where: str,
    question: str,
    rows: Sequence[Mapping[Any, Any]],
    yes: Mapping[str, str],
    no: Mapping[str, str],
) -> Unclear:
    columns = ", ".join(_described(rows))
    return Unclear(
        f"{where}: {question} {columns}; if so, set {fields(where, yes)}; if not, {fields(where, no)}"
    )


def which(where: str, why: str, rows: Sequence[Mapping[Any, Any]]) -> Unclear:
    """Return the question which column is the answer; it proposes none, because nothing supports a guess."""
    form = fields(where, {"instruction": "COLUMN", "output": "COLUMN"})
    columns = _described(rows)
    return Unclear(
        f"{where}: {why}; which column is the answer? {', '.join(columns)}; say it as {form}; a template such as"
        " '{a}: {b}' joins columns, and COLUMN: none leaves one out",
        "\n  ".join([f"{why}; its columns:", *columns]),
    )


def _described(rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    """Return each column of rows, and each key of objects, with type, length and an example."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            inner = {str(name): value}
            if isinstance(value, Mapping):
                inner = {f"{name}.{key}": each for key, each in value.items()}
            for column, each in inner.items():
                if each not in EMPTY:
                    values.setdefault(column, []).append(each)
    parts = []
    for name, given in itertools.islice(values.items(), 16):
        about = type_name(given[0]).removeprefix("a ").removeprefix("an ")
        if isinstance(given[0], str):
            about = plural(round(words_of(given)), "word")
        parts.append(f"{one_line(name, 40)} ({about}, such as {excerpt(given[0], 30)})")
    return parts


def words_of(values: Iterable[Any]) -> float:
    """Return the median number of words of texts, also inside of lists and objects; JSON and addresses have none."""
    counts = []
    for value in values:
        texts = [*_texts(value)]
        if texts and not texts[0].startswith(("{", "[", "http")):
            counts.append(sum(len(text.split()) for text in texts))
    return median(counts) if counts else 0


def excerpt(value: Any, most: int = 60) -> str:
    """Return the beginning of a value as JSON, in one line."""
    return one_line(json.dumps(value, ensure_ascii=False, default=repr), most)


def fields(where: str, mapped: Mapping[str, str]) -> str:
    """Return the fields of the source `where` as an argument for a shell."""
    line = yaml.safe_dump(
        dict(mapped), default_flow_style=True, allow_unicode=True, width=9**9, sort_keys=False
    )
    return shlex.quote(f"{where}.fields={line.strip()}")
