"""Format alpaca: an instruction with its input and output; a chat of one question, after an optional history."""

from typing import Any

from olora_ray.data.formats.chat import ANSWERS, SYSTEM, question_answer, sequence, to_chat
from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row


def read(row: Row) -> Example:
    instruction = row.text("instruction")
    answer = row.text("output")
    extra = row.optional_text("input")
    messages: list[Any] = []
    if system := row.optional_text("system"):
        messages.append({"role": "system", "content": system})
    for question, earlier in _history(row):
        messages += question_answer(question, earlier)
    asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return to_chat([*messages, *question_answer(asked, answer)])


def _history(row: Row) -> list[Any]:
    if not (value := row.optional("history")):
        return []
    pairs = sequence(value, row.column("history"))
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Rejected(
            "wrong_type",
            f"field {row.column('history')!r} is not a list of [question, answer] pairs",
        )
    return pairs


FORMAT = Format(
    "alpaca",
    read,
    makes="chat",
    fields=(
        Field("instruction", ("prompt", "question", "query", "problem", "user"), needed=True),
        Field("input", ("context", "article", "passage")),
        Field("output", ("answer", "response", "completion", *ANSWERS), needed=True),
        SYSTEM,
        Field("history"),
    ),
    rules=2,
)
