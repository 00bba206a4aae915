"""Format preference: two answers to one prompt, of which people preferred one.

The prompt is a text, or messages; the answers are texts, messages, or whole conversations that begin alike. Their own
common messages win over a prompt beside them, which then repeats the question.
"""

import re
from collections.abc import Mapping
from typing import Any

from olora_ray.data.formats.chat import SHAREGPT_ROLES, SYSTEM, after_system, in_a_cell, to_chat
from olora_ray.data.formats.format import (
    Completion,
    Example,
    Field,
    Format,
    Pair,
    Rejected,
    Row,
    type_name,
)

TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
"""Beginning of a turn in the texts of hh-rlhf."""
Turns = list[Any]
KEPT = {"tool_calls", "tool_call_id", "name", "weight"}
"""Keys of a message beside role and content; datasets add numbers and scores that differ between equal messages."""


def read(row: Row) -> Example:
    chosen = _answer(row, "chosen")
    rejected = _answer(row, "rejected")
    prompt = _prompt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str) and not row.as_chat:
            _require_two(chosen, rejected)
            return Pair(Completion(prompt, chosen), Completion(prompt, rejected))
        as_turns = _turns if prompt is not None else _transcript
        return _of_turns(row, as_turns(chosen), as_turns(rejected), prompt)
    if isinstance(chosen, str):
        raise Rejected("wrong_type", "chosen and rejected must both be texts, or both be messages")
    if isinstance(rejected, str):  # ms-swift: a conversation, and another last answer
        rejected = [*chosen[:-1], *_turns(rejected)]
    return _of_turns(row, chosen, rejected, prompt)


def _of_turns(row: Row, chosen: Turns, rejected: Turns, prompt: str | Turns | None) -> Pair:
    if not row.as_chat:
        raise Rejected("wrong_type", "chosen and rejected are messages; set chat: true")
    same = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        same += 1
    context = chosen[:same]
    if not context and isinstance(prompt, str):
        context = [{"role": "user", "content": prompt}]
    elif not context and isinstance(prompt, list):
        context = prompt
    if not context:
        raise Rejected(
            "missing_field",
            "chosen and rejected begin with different messages, and there is no prompt; add a column prompt",
        )
    context = after_system(row, context, "role", "content")
    # The assistant's messages of the prompt are context, so they get weight 0.
    context = [{**turn, "weight": 0} if _is_answer(turn) else turn for turn in context]
    _require_two(chosen, rejected)
    pairs = []
    for name, turns in (("chosen", chosen[same:]), ("rejected", rejected[same:])):
        if not any(_is_answer(turn) for turn in turns):
            raise Rejected("no_answer", f"field {name!r} has no assistant message of its own")
        pairs.append(to_chat([*context, *turns], row.optional("tools")))
    return Pair(*pairs)


def _require_two(chosen: str | Turns, rejected: str | Turns) -> None:
    if chosen == rejected:
        raise Rejected("same_answers", "chosen and rejected are the same")


def _answer(row: Row, name: str) -> str | Turns:
    value = row.optional(name)
    if value is None and row.column(name) in row.columns:
        raise Rejected(
            "missing_field",
            f"field {row.column(name)!r} is null; a row with one answer belongs into a file of its own,"
            " as prompt and completion",
        )
    value = in_a_cell(row.value(name))
    if isinstance(value, Mapping):  # LLaMA-Factory
        value = [value]
    if isinstance(value, list):
        return [with_role(turn) for turn in value]
    if not isinstance(value, str):  # such as a mark that an answer was rejected
        problem = f"field {row.column(name)!r} is {type_name(value)}, not an answer"
        raise Rejected("wrong_type", problem)
    if not value.strip():
        raise Rejected("empty_answer", f"field {row.column(name)!r} is empty")
    return value


def _prompt(row: Row) -> str | Turns | None:
    column = row.column("prompt")
    value = in_a_cell(row.optional("prompt"))
    if isinstance(value, Mapping) and "messages" in value:  # OpenAI
        value = value["messages"]
    if isinstance(value, str) and row.as_chat and value.startswith("\n\nHuman:"):  # Anthropic
        value = [turn for turn in _transcript(value) if turn["content"]]
    turns: Turns = []
    if isinstance(value, list):
        turns = [with_role(turn) for turn in value]
    elif isinstance(value, str):
        more = row.optional("input")
        if column != row.column("input") and isinstance(more, str) and more.strip():
            value = f"{value}\n\n{more}"
        turns = [{"role": "user", "content": value}]
    elif value is None:
        return None
    else:
        problem = f"field {column!r} is {type_name(value)}, not a text or a list of messages"
        raise Rejected("wrong_type", problem)
    system = row.optional_text("system")
    if system:
        return [{"role": "system", "content": system}, *turns]
    return value if isinstance(value, str) else turns


def with_role(turn: Any) -> Any:
    if isinstance(turn, Mapping) and "from" in turn and "value" in turn:
        name = str(turn["from"]).lower()
        return {"role": SHAREGPT_ROLES.get(name, name), "content": turn["value"]}
    if isinstance(turn, Mapping):
        return {key: turn[key] for key in turn if key in ("role", "content") or key in KEPT}
    return turn


def _transcript(text: str) -> Turns:
    parts = TRANSCRIPT.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise Rejected(
            "missing_field",
            "chosen and rejected are texts, and there is no prompt; add a column prompt",
        )
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": names[name], "content": content.strip()}
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _turns(answer: str) -> Turns:
    return [{"role": "assistant", "content": answer}]


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "assistant"


FORMAT = Format(
    "preference",
    read,
    makes="pair",
    fields=(
        Field(
            "chosen",
            ("preferred", "preferred_output", "chosen_response", "response_chosen"),
            last_names=("messages", "answer", "response", "output", "completion"),
            needed=True,
        ),
        Field(
            "rejected",
            (
                "non_preferred_output",
                "non_preferred",
                "dispreferred",
                "rejected_response",
                "response_rejected",
                "rejected_messages",
                "rejected_answer",
                "rejected_output",
                "rejected_completion",
            ),
            needed=True,
        ),
        Field(
            "prompt",
            ("question", "instruction", "query", "conversations"),
            last_names=("messages", "input"),
        ),
        Field("input"),
        SYSTEM,
        Field("tools"),
    ),
    tools=True,
)
