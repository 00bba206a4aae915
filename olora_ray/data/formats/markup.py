"""Markups of other tools: a whole chat in one text, with a mark where each turn begins.

Such a text becomes the turns of a chat: the model's own template writes it, and only the answers are supervised.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olora_ray.data.formats.format import Rejected


@dataclass(frozen=True)
class Marks:
    """The marks of a markup."""

    begin: str
    """Pattern of the mark with which a turn begins. Its group is the mark's name."""
    roles: Mapping[str, str]
    """Name of a mark, without blanks and <s> -> role; the role of any other mark is its name."""
    end: str
    """Pattern, without a group, of what ends a turn."""
    before: str = ""
    """Pattern of what may stand before the first turn; it is left out."""


# A text is in the first markup of which it has a mark.
MARKUPS: Mapping[str, Marks] = {
    "llama3": Marks(
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>",
        {"ipython": "tool"},
        r"(?:<\|(?:eot_id|eom_id|end_of_text)\|>\s*)+",
        before=r"<\|begin_of_text\|>",
    ),
    "chatml": Marks(
        r"<\|im_start\|> *(\w+)[ \t]*\n",
        {},
        r"<\|im_end\|>\s*(?:<\|endoftext\|>|</s>)?",
        before=r"<s>|<\|endoftext\|>",
    ),
    "llama2": Marks(
        r"((?:<s>)?\s*\[INST\](?:\s*<<SYS>>)?|<</SYS>>|\[/INST\])",
        {
            "[INST]<<SYS>>": "system",
            "<</SYS>>": "user",
            "[INST]": "user",
            "[/INST]": "assistant",
        },
        r"</s>\s*\Z",
    ),
    "guanaco": Marks(
        r"### *(Human|Assistant|System):",
        {"Human": "user", "Assistant": "assistant", "System": "system"},
        r"(?:###|</s>|<\|endoftext\|>)\s*\Z",
    ),
    # What Alpaca writes before an instruction is the same in all rows.
    "instruction": Marks(
        r"### *(Instruction|Input|Response):",
        {"Instruction": "user", "Response": "assistant"},
        r"(?:### End|###|</s>|<\|endoftext\|>)\s*\Z",
        before=r"Below is an instruction that describes a task[^#]*",
    ),
    "glaive": Marks(
        r"(?m)^\s*(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):",
        {
            "SYSTEM": "system",
            "USER": "user",
            "ASSISTANT": "assistant",
            "FUNCTIONRESPONSE": "tool",
        },
        r"(?:<\|endoftext\|>\s*)+\Z",
    ),
}


def is_marked(text: str) -> bool:
    """True if a turn of any markup begins in the text."""
    return any(re.search(marks.begin, text) for marks in MARKUPS.values())


def turns_in(text: str, markup: str) -> list[dict[str, Any]]:
    """Return the turns of a text in a markup, or for `auto` in any; none if no turn begins.

    Raise Rejected if the text is not all in the markup.
    """
    for name, marks in MARKUPS.items():
        before, *parts = re.split(marks.begin, text)
        if not parts or markup not in (name, "auto"):
            continue
        outside = [re.sub(marks.before, "", before, count=1)]
        turns: list[dict[str, Any]] = []
        for mark, part in zip(parts[::2], parts[1::2], strict=True):
            content, *after = re.split(marks.end, part, maxsplit=1)
            outside += after
            role = re.sub(r"<s>|\s", "", mark)
            if role == "Input" and turns:
                joined = f"{turns[-1]['content']}\n\n{content.strip()}"
                turns[-1]["content"] = joined.rstrip()
            else:
                turns.append({"role": marks.roles.get(role, role), "content": content.strip()})
        strays = [stray.strip() for stray in outside if stray.strip()]
        if strays:
            problem = f"markup {name}: {strays[0][:40]!r} is outside of the turns"
            raise Rejected("bad_markup", f"{problem}; markup: none trains the texts as they are")
        return turns
    return []
