"""Format alpaca: an instruction with its input and output; a chat of one question, after an optional history."""

from typing import Any

from olora_ray.data.formats.chat import ANSWERS, SYSTEM, question_answer, sequence, to_chat
from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row

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
        column = row.column("history")
        for turn in sequence(history, column):
            if isinstance(turn, dict):  # of Cohere: {role: USER, message: ...}
                content = turn.get("message", turn.get("content"))
                messages.append({"role": turn.get("role"), "content": content})
            elif isinstance(turn, list) and len(turn) == 2:
                messages += question_answer(*turn)
            else:
                raise Rejected(
                    "wrong_type",
                    f"field {column!r} is not a list of [question, answer] pairs or messages",
                )
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
