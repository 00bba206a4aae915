"""Format alpaca: an instruction with its input and output; a chat of one question, after an optional history."""

from olora_ray.data.formats.chat import ANSWERS, SYSTEM, question_answer, sequence, to_chat
from olora_ray.data.formats.format import Example, Field, Format, Rejected, Row

# In German, Spanish, French, Italian and Chinese.
FOREIGN_QUESTIONS = ("frage", "pregunta", "domanda", "问题")
FOREIGN_ANSWERS = ("antwort", "respuesta", "réponse", "risposta", "答案", "回答")


def read(row: Row) -> Example:
    instruction = row.text("instruction")
    answer = row.text("output")
    extra = row.optional_text("input")
    messages = []
    system = row.optional_text("system")
    if system:
        messages.append({"role": "system", "content": system})
    history = row.optional("history")
    if history:
        column = row.column("history")
        pairs = sequence(history, column)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise Rejected(
                "wrong_type", f"field {column!r} is not a list of [question, answer] pairs"
            )
        for question, earlier in pairs:
            messages += question_answer(question, earlier)
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
