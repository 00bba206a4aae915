"""Columns of rows, and keys of messages, that nothing reads: which of them need an answer before a training.

A column may decide what a row means, whatever its name is. So each text, list or object that is not read needs an
answer, unless its name says that it is about the row, it looks like a number or a reference, it is the same in all
rows, or what is read repeats it. The user answers in the `fields` of the source: a field for the column, or `none`.
"""

import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import yaml

from olora_ray.common.errors import UserError
from olora_ray.config.section import Source
from olora_ray.data.formats import columns_of, format_named, own_formats
from olora_ray.data.formats.chat import REASONING, ROLES, SHAREGPT_ROLES
from olora_ray.data.formats.format import EMPTY, NONE, Chat, Example, one_line
from olora_ray.data.formats.prompt_completion import COMPLETION

WORD = re.compile(r"[^\W\d_]+")
# A column is about the row if these words are the last one of its name, ...
ENDS = {
    *WORD.findall(
        "id uuid hash sha url uri date time timestamp at nr count index idx score model version"
    )
}
# ... or these words are all of its name. The words of `WEAK` say nothing by themselves.
WEAK = {*WORD.findall("user name type code by on of last title")}
ABOUT = (
    ENDS
    | WEAK
    | {
        *WORD.findall(
            "source origin dataset repo split fold subset language lang revision license licence created email"
        ),
        *WORD.findall(
            "author creator annotator assignee reporter editor worker username file filename path link"
        ),
        *WORD.findall(
            "updated modified meta metadata embedding quelle sprache autor bearbeiter fuente auteur langue"
        ),
        *("来源", "作者"),
    }
)
# Words of names of columns that decide what is trained, whatever their values are.
DECIDES = {
    *WORD.findall("label class mask weight train kto chosen rejected preferred sentiment intent"),
    *WORD.findall("image img picture photo screenshot pixel audio video speech"),
}
MEDIA = re.compile(
    r".*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|wav|mp3|flac|ogg|m4a|mp4|mov|avi|webm)\b", re.IGNORECASE
)
# Names of fields in this and other tools. A column of such a name is never a constant without meaning.
KNOWN = {
    name
    for format in own_formats()
    for field in format.fields
    if format.makes != "ids"
    for name in (field.name, *field.other_names)
} - {field.name for format in own_formats() for field in format.fields if field.in_turn}
# A tokenizer writes these columns beside a text.
TOKENIZED = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"}
# A number, a time, or true or false in a cell of csv; an address; a reference such as TN-10007 or 7 C 10007/23.
ABSTRACT = re.compile(
    r"[-+€$£]?\d[\d.,]*\s?[%€$£]?|\d+([./:-]\d+)+[T ]?[\d:.]*Z?([+-]\d\d:?\d\d)?"
    r"|(?i:true|false|wahr|falsch|vrai|faux|nan|null|none)"
    r"|https?://\S+|\S+@\S+|(?=(?:\D*\d){4})(?:\w{1,3}\s){0,3}[\w.:/<>-]+"
)


def note_unread(
    notes: "Counter[str]",
    number: int,
    source: Source,
    row: Any,
    example: Example,
    template: str = "",
) -> None:
    """Note the columns of a row, and the keys of its messages, that may need an answer, for `unresolved_error`.

    Without the chat template it is not known which keys are read, so only those that decide are noted.
    """
    used = _used(source.format, *source.fields.items())
    read = _read_keys(template)
    messages = example.messages if isinstance(example, Chat) else ()
    left = []
    if isinstance(row, Mapping):
        left += [("column", name, value) for name, value in row.items() if name not in used]
    for message in messages:
        for name, value in message.items():
            if name not in read and (template or DECIDES.intersection(_words(name))):
                left.append(("key", name, value))
    for kind, name, value in left:
        if name in TOKENIZED or source.fields.get(name, name) != name or value in EMPTY:
            continue
        needed = severity(source.format, str(name), value)
        if not needed:
            continue
        if kind == "column":
            own = [row.get(column) for column in used]
        else:
            own = []
            for message in messages:
                own += [message[key] for key in message if key in read and key != "role"]
        # Columns that repeat what is read: the first question beside messages, all texts joined beside a question.
        seen = [*_texts(own)]
        texts = {*_texts(value)} - ROLES - {*SHAREGPT_ROLES}
        joined = len(seen) > 1 and isinstance(value, str) and all(text in value for text in seen)
        if texts and (joined or texts.issubset(seen)):
            continue
        note = f"unread\t{number}\t{kind}\t{json.dumps(str(name))}\t{needed}\t"
        others = sum(other.startswith(note) for other in notes)
        note += one_line(json.dumps(value, ensure_ascii=False, default=repr), 60)
        if note in notes or (others < 2 and len(notes) < 100):
            notes[note] += 1


@lru_cache(64)
def _used(format: str, *fields: tuple[str, str]) -> frozenset[str]:
    return frozenset(columns_of(format, dict(fields)))


@lru_cache(8)
def _read_keys(template: str) -> frozenset[str]:
    named = re.findall(r"(?<=[.'\"])\w+", template)
    return frozenset({"role", "content", "tool_calls", "weight", *REASONING, *named})


def severity(format: str, name: str, value: Any) -> int:
    """Return 2 if a value needs an answer, 1 if it needs one unless all rows have it, else 0."""
    if name == "olora_ray":  # what `olora-ray follow --rows` notes about a row
        return 0
    words = _words(name)
    texts = [*_texts(value)]
    known = name.lower().strip()
    if (
        DECIDES.intersection(words)
        or known in COMPLETION.other_names
        or any(map(MEDIA.match, texts))
    ):
        return 2
    # A title is a part of a question, but not of a document or a chat.
    if words == ("title",) and len(format_named(format).needed) == 1:
        return 0
    # A prompt may stand in metadata, too, and a sentence to translate in a column `source`.
    if ENDS.intersection(words[-1:]) or (ABOUT.issuperset(words) and not WEAK.issuperset(words)):
        inner = re.findall(r'(\w+)\\?": ?', json.dumps(value, default=repr)) if texts else ()
        if KNOWN.isdisjoint(inner) and not any(map(_is_prose, texts)):
            return 0
    if not isinstance(value, str):
        return 2 if texts or isinstance(value, list | bytes) else 0
    if not texts or ABSTRACT.fullmatch(texts[0]):
        return 0
    if len(value.split()) <= 2 and KNOWN.isdisjoint((known, *words[-1:])):
        return 1
    return 2


@lru_cache(2**12)
def _words(name: str) -> tuple[str, ...]:
    words = WORD.findall(
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    )
    return tuple(word if word == "class" else word.removesuffix("s") for word in words)


def _is_prose(text: str) -> bool:
    words = text.split()
    lower = any(word.islower() and len(word) > 3 for word in words)  # not in a title or a name
    return len(words) > 12 or (len(words) > 2 and lower) or text.endswith(("。", "！", "？"))


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
        if isinstance(part, str | dict | list):
            yield from _texts(part)


def unresolved_error(
    notes: Mapping[str, int],
    sources: Mapping[int, Source],
    setting: str,
    rows: int = 0,
    auto: bool = False,
) -> UserError | None:
    """Return the error for the first source with a column or key that needs an answer; None if none needs one.

    `rows` is the number of rows behind the notes, if it is known: a value that some of them lack is no constant.
    The notes of a store may be older than an answer. `auto` is True if the format was detected.
    """
    needed: dict[int, dict[str, tuple[str, str]]] = {}
    met = Counter[tuple[int, str]]()
    for note, count in notes.items():
        if not note.startswith("unread\t"):
            continue
        _, place, kind, quoted, severity, example = note.split("\t")
        number = int(place)
        name = json.loads(quoted)
        met[number, name] += int(severity)
        varies = met[number, name] > 1 or rows == 1 or count < rows
        if varies and name not in sources[number].fields:
            needed.setdefault(number, {})[name] = (kind, example)
    if not needed:
        return None
    number, unread = next(iter(needed.items()))
    return _refusal(
        dict(itertools.islice(unread.items(), 12)), f"{setting}.{number}", sources[number], auto
    )


def _refusal(
    needed: Mapping[str, tuple[str, str]], where: str, source: Source, auto: bool
) -> UserError:
    name, (kind, example) = next(iter(needed.items()))
    format = format_named(source.format)
    free = {field.name for field in format.fields if not field.needed and not field.in_turn}
    free -= source.fields.keys()
    way = ""
    if free and kind == "column":
        way = f"map it to a field ({', '.join(sorted(free))}), or "
    if auto and format.makes == "text" and example.startswith('"'):
        answer = {"instruction": source.fields.get("text", "text"), "output": name}
        way = f"train it as the answer with {fields(where, answer)}, or "
    shown = ", ".join(
        f"{kind} {name!r} (such as {example})" for name, (kind, example) in needed.items()
    )
    out = fields(where, {**source.fields, **dict.fromkeys(needed, NONE)})
    return UserError(
        f"{where}: {source.format} rows do not use {shown}; {way}leave it out with {out}"
    )


def fields(where: str, mapped: dict[str, str]) -> str:
    """Return the fields of the source `where` as an argument for a shell."""
    line = yaml.safe_dump(
        mapped, default_flow_style=True, allow_unicode=True, width=9**9, sort_keys=False
    )
    return shlex.quote(f"{where}.fields={line.strip()}")
