"""Format alpaca: an instruction with its input and output; a chat of one question, after an optional history."""

from collections.abc import Mapping
from typing import Any

from olora_ray.data.formats.chat import ANSWERS, SYSTEM, in_turn, question_answer, sequence, to_chat
from olora_ray.data.formats.format import Example, Field, Format, Row

# In German, Spanish, French, Italian and Chinese.
FOREIGN_QUESTIONS = ("frage", "pregunta", "domanda", "问题")
FOREIGN_ANSWERS = ("antwort", "respuesta", "réponse", "risposta", "答案", "回答")


def read(row: Row) -> Example:
    instruction = row.text("instruction")
    answer = row.text("output")
    extra = row.optional_text("input")
    messages: list[Any] = []
    system = row.optional_text("system")
    if system:
        messages.append({"role": "system", "content": system})
    history = row.optional("history")
    if history:
        for turn in in_turn(sequence(history, row.column("history"))):
            if (
                isinstance(turn, Mapping) and "message" in turn
            ):  # of Cohere: {role: USER, message: ...}
                turn = {"role": turn.get("role"), "content": turn["message"]}
            messages.append(turn)
    if extra.strip():
        instruction = f"{instruction}\n\n{extra}"
    return to_chat([*messages, *question_answer(instruction, answer)])


FORMAT = Format(
    "alpaca",
    read,
    makes="chat",
    fields=(
        Field(
            "instruction",
            ("prompt", "question", "query", "problem", "user", "inputs", *FOREIGN_QUESTIONS),
            ("document", "dialogue", "article", "text", "content", "context"),
            needed=True,
        ),
        Field("input", ("context", "article", "passage")),
        Field(
            "output",
            ("answer", "response", "completion", *ANSWERS, *FOREIGN_ANSWERS),
            ("summary", "highlights", "abstract"),
            needed=True,
        ),
        SYSTEM,
        Field("history"),
    ),
    rules=2,
)
