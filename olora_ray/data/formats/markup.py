"""Markups of other tools: a whole chat in one text, with a mark where each turn begins.

Such a text becomes the turns of a chat: the model's own template writes it, and only the answers are supervised.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olora_ray.config.section import Source, is_auto
from olora_ray.data.formats.format import Rejected


@dataclass(frozen=True)
class Marks:
    """The marks of a markup."""

    begin: str
    """Pattern of the mark with which a turn begins. Its group is the mark's name; without a group, all of it is."""
    roles: Mapping[str, str]
    """Name of a mark, without blanks and <s> -> role; the role of any other mark is its name."""
    end: str
    """Pattern of what ends a turn."""
    before: str = ""
    """Pattern of what may stand before the first turn; it is left out."""


MARKUPS: Mapping[str, Marks] = {
    "guanaco": Marks(
        r"### *(Human|Assistant|System):",
        {"Human": "user", "Assistant": "assistant", "System": "system"},
        r"(###|</s>|<\|endoftext\|>)\s*\Z",
    ),
    "llama2": Marks(
        r"(?:<s>)?\s*\[INST\](?:\s*<<SYS>>)?|<</SYS>>|\[/INST\]",
        {
            "[INST]<<SYS>>": "system",
            "<</SYS>>": "user",
            "[INST]": "user",
            "[/INST]": "assistant",
        },
        r"</s>\s*\Z",
    ),
    "llama3": Marks(
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>",
        {"ipython": "tool"},
        r"(<\|(eot_id|eom_id|end_of_text)\|>\s*)+",
        before=r"<\|begin_of_text\|>",
    ),
    "chatml": Marks(
        r"<\|im_start\|> *(\w+)[ \t]*\n",
        {},
        r"<\|im_end\|>\s*(<\|endoftext\|>|</s>)?",
        before=r"<s>|<\|endoftext\|>",
    ),
    # What Alpaca writes before an instruction is the same in all rows.
    "instruction": Marks(
        r"### *(Instruction|Input|Response):",
        {"Instruction": "user", "Input": "input", "Response": "assistant"},
        r"(### End|###|</s>|<\|endoftext\|>)\s*\Z",
        before=r"Below is an instruction that describes a task[^#]*",
    ),
    "glaive": Marks(
        r"(?m)^\s*(USER|ASSISTANT|FUNCTION RESPONSE):",
        {"USER": "user", "ASSISTANT": "assistant", "FUNCTIONRESPONSE": "tool"},
        r"(<\|endoftext\|>\s*)+\Z",
    ),
}


def turns_in(text: str, name: str) -> list[dict[str, Any]]:
    """Return the turns of a text; raise Rejected with the place if it is not all in the markup."""
    marks = MARKUPS[name]
    begins = list(re.finditer(marks.begin, text))
    if not begins:
        raise Rejected("bad_markup", f"markup {name}: no turn begins")
    start = begins[0].start()
    if not re.fullmatch(rf"\s*({marks.before})?\s*", text[:start]):
        raise _outside(name, text, 0, "is before the first turn")
    turns: list[dict[str, Any]] = []
    stops = [*(begin.start() for begin in begins[1:]), len(text)]
    for begin, stop in zip(begins, stops, strict=True):
        content = text[begin.end() : stop]
        end = re.search(marks.end, content)
        if end and content[end.end() :].strip():
            raise _outside(name, text, begin.end() + end.end(), "is after the end of a turn")
        if end:
            content = content[: end.start()]
        mark = re.sub(r"<s>|\s", "", begin[begin.re.groups])
        role = marks.roles.get(mark, mark)
        if role != "input":
            turns.append({"role": role, "content": content.strip()})
        elif turns and content.strip():
            turns[-1]["content"] += f"\n\n{content.strip()}"
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or "assistant" not in roles:
        problem = f"markup {name}: no question with its answer; roles: {', '.join(roles) or 'none'}"
        raise Rejected("bad_markup", problem)
    return turns


def _outside(name: str, text: str, at: int, where: str) -> Rejected:
    at += len(text[at:]) - len(text[at:].lstrip())
    shown = text[at : at + 40]
    return Rejected("bad_markup", f"markup {name}: character {at + 1}, {shown!r}, {where}")


def chats_in(rows: Sequence[Any], source: Source, columns: Sequence[str]) -> tuple[Source, str]:
    """Return the source as one of chats if a column has texts in a markup, and what to say about it.

    The first of `columns` counts in which all texts are in one markup; if the source sets a markup, most of them. The
    source stays as it is if there is none.
    """
    if source.markup == "none" or source.chat is False:
        return source, ""
    names = list(MARKUPS) if is_auto(source.markup) else [source.markup]
    almost = ""
    for column in columns:
        texts = [row[column] for row in rows if isinstance(row, Mapping) and column in row]
        for name in names:
            problems = [_problem(text, name) for text in texts]
            read = problems.count(None)
            if texts and (read == len(texts) or (read and not is_auto(source.markup))):
                fields = {key: value for key, value in source.fields.items() if key != "text"}
                fields["messages"] = column
                chats = source.model_copy(update={"markup": name, "fields": fields})
                return chats, f"markup {name}: {SAID}"
            partly = [problem for problem in problems if problem and "no turn" not in problem]
            if texts and read + len(partly) == len(texts):
                almost = f"{read} of {len(texts)} texts are chats in markup {name}, but {partly[0]}"
    return source, almost


SAID = "only the answers are trained, in the model's own chat template; markup: none trains the texts as they are"


def _problem(text: Any, name: str) -> str | None:
    if not isinstance(text, str):
        return "a value is not text"
    try:
        turns_in(text, name)
    except Rejected as why:
        return why.message
    return None
