"""Format prompt_completion: a prompt with its completion, as texts or as messages; `chat` makes it a chat."""

from collections.abc import Mapping
from typing import Any

from olora_ray.data.formats.chat import ANSWERS, in_a_cell, question_answer, to_chat
from olora_ray.data.formats.format import Completion, Example, Field, Format, Rejected, Row


def read(row: Row) -> Example:
    prompt = in_a_cell(row.value("prompt"))
    completion = in_a_cell(row.value("completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        if not row.as_chat:
            raise Rejected(
                "wrong_type", "prompt and completion are lists of messages; set chat: true"
            )
        if not any(_is_answer(turn) for turn in completion):
            raise Rejected(
                "no_answer", f"field {row.column('completion')!r} has no assistant message"
            )
        # Assistant messages of the prompt are context, so they get weight 0.
        context = [{**turn, "weight": 0} if _is_answer(turn) else turn for turn in prompt]
        return to_chat([*context, *completion], row.optional("tools"))
    prompt = row.text("prompt")
    completion = row.text("completion")
    if not completion.strip():
        raise Rejected("empty_answer", f"field {row.column('completion')!r} is empty")
    if row.as_chat:
        return to_chat(question_answer(prompt, completion), row.optional("tools"))
    if row.optional("tools") not in (None, "", "[]", []):
        raise Rejected(
            "wrong_type",
            f"field {row.column('tools')!r} needs a chat: set chat: true, or remove the tools",
        )
    return Completion(prompt, completion)


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


COMPLETION = Field("completion", ("answer", "response", "output", *ANSWERS), needed=True)
FORMAT = Format(
    "prompt_completion",
    read,
    makes="completion",
    fields=(
        Field(
            "prompt",
            ("question", "query", "instruction", "input", "problem", "user"),
            needed=True,
        ),
        COMPLETION,
        Field("tools"),
    ),
    tools=True,
    rules=3,
)
