"""The scorer of the recipe, for `evaluation.scorer`: recipes.tool_calls.score:call.

The commands find it by this name, because Python looks for modules in pipelines/, beside the script that it runs.
"""

import json
import re

CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def call(prediction: str, reference: str) -> dict[str, float]:
    """Score the name of the tool, and the whole call; a reference without a call needs an answer without one."""
    name, arguments = _read(prediction)
    right, expected = _read(reference)
    return {"tool": float(name == right), "call": float(name == right and arguments == expected)}


def _read(text: str) -> tuple[object, object]:
    found = CALL.search(text)
    if not found:
        return "broken" if "<tool_call>" in text else None, None
    try:
        read = json.loads(found[1])
        return read["name"], read["arguments"]
    except (ValueError, KeyError):
        return "broken", None
