"""Format turns: a chat as a list without roles: texts of the user and the assistant in turn, or pairs of both."""

from typing import Any

from olora_ray.data.formats.chat import SYSTEM, after_system, sequence, to_chat
from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row, listed, type_name

QUESTIONS = {"input", "instruction", "question", "query", "prompt", "user", "human"}
ANSWERS = {"output", "answer", "response", "completion", "assistant", "bot", "gpt"}


def read(row: Row) -> Example:
    texts: list[Any] = []
    for number, entry in enumerate(sequence(row.value("turns"), row.column("turns")), 1):
        if isinstance(entry, str):
            texts.append(entry)
        elif isinstance(entry, list) and len(entry) == 2:
            texts += entry
        elif isinstance(entry, dict):
            texts += _pair(entry, number)
        else:
            raise Rejected("wrong_type", f"turn {number} is {type_name(entry)}, no text or pair")
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]
    return to_chat(after_system(row, turns, "role", "content"))


def _pair(entry: dict[str, Any], number: int) -> list[Any]:
    questions = QUESTIONS & entry.keys()
    answers = ANSWERS & entry.keys()
    if len(questions) == len(answers) == 1:
        return [entry[questions.pop()], entry[answers.pop()]]
    raise Rejected(
        "missing_field",
        f"turn {number} is no pair of a question and an answer; it has {listed(entry)}",
    )


FORMAT = Format(
    "turns",
    read,
    makes="chat",
    fields=(
        Field("turns", ("conversation", "conversations", "dialogue", "dialog"), needed=True),
        SYSTEM,
    ),
)
