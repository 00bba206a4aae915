"""What a person may have meant, where no row of a file can be read in the format of its source.

A suggestion is only made if the row can be used with it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from olora_ray.data.example import Rejected
from olora_ray.data.formats import FORMATS, NEEDED, to_example

OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "problem", "user"),
    "completion": ("answer", "response", "output", "target", "solution", "label", "chosen", "assistant"),
    "instruction": ("prompt", "question", "query", "problem", "task", "user"),
    "output": ("answer", "response", "completion", "target", "solution", "label", "chosen", "assistant"),
    "messages": ("conversation", "conversations", "chat", "dialogue", "dialog", "turns"),
    "conversations": ("conversation", "messages", "chat", "dialogue", "dialog", "turns"),
    "text": ("content", "document", "body", "article", "passage"),
}
"""What corpora call the fields of our formats."""
ROLE = ("from", "role", "speaker", "author")
WORDS = ("value", "content", "text", "message")
"""What turns call the role and what was said; sharegpt's own names come first."""


def columns(format: str, row: Any) -> str | None:
    """How a source must be set for this row to be used, as `format: alpaca, fields: {output: answer}`."""
    if not isinstance(row, Mapping):
        return None
    others = [name for name in NEEDED if name not in (format, "text")]
    # What needs the fewest words first; a column called text may stand beside those that are meant.
    tried: list[tuple[str, dict[str, str]]] = [(name, {}) for name in others]
    tried += [(name, fields) for name in (format, *others, "text") for fields in _fields(name, row)]
    for name, fields in tried:
        if _usable(name, row, fields):
            parts = [f"format: {name}"] if name != format else []
            shown = ", ".join(f"{field}: {column}" for field, column in fields.items())
            return ", ".join([*parts, *([f"fields: {{{shown}}}"] if fields else [])]) or None
    return None


def file(kind: str, columns: tuple[str, ...], begin: bytes) -> str | None:
    """What is odd about a file of this kind with these columns, seen from its first bytes."""
    first = begin.lstrip(b"\xef\xbb\xbf \t\r\n")
    if kind == "jsonl" and first.startswith(b"["):
        return "the file is one JSON list, not an object on each line: call it .json"
    if kind == "jsonl" and first.split(b"\n")[0].strip() == b"{":
        return "a .jsonl file has a whole object on each line; one object over several lines is a .json file"
    if kind == "csv" and len(columns) == 1 and (separator := next((c for c in ";\t|" if c in columns[0]), None)):
        remedy = "call it .tsv" if separator == "\t" else "write the file with commas"
        return f"the cells seem to be separated by {separator!r}: {remedy}"
    return None


def _fields(format: str, row: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Ways to map the format's fields to the row's columns: none, other names, and for turns other names in them."""
    yield {}
    lower = {str(name).lower().strip(): str(name) for name in row}
    found: dict[str, str] = {}
    for field in NEEDED[format]:
        names = (name for name in (field, *OTHER_NAMES[field]) if name in lower and lower[name] not in found.values())
        column = next(names, None)
        if column is None:
            return
        found[field] = lower[column]
    renamed = {field: column for field, column in found.items() if field != column}
    yield renamed
    if format == "sharegpt":
        turns = row[found["conversations"]]
        turn = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(turn, Mapping):
            role, words = (next((name for name in names if name in turn), names[0]) for names in (ROLE, WORDS))
            inner = {"from": role, "value": words}
            yield renamed | {field: name for field, name in inner.items() if field != name}


def _usable(format: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> bool:
    assert format in FORMATS
    try:
        to_example(format, row, fields)
    except Rejected:
        return False
    return True
