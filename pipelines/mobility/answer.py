"""The answer that a model shall write, and how it is read: MoBLLM's (2503.16553) form and rule.

The commands in pipelines/ import the scorer as mobility.answer:next_place, so this module imports none of its folder.
"""

import ast
import json
import re

from olora_ray.common.errors import UserError

KEY = "prediction"
LONGEST = 400
"""Characters of braces that are looked into: Python's parser is not for more of what a model may write."""
BOUND = 10**18
"""No place has so large a number: a model that repeats a digit names none, and arrays hold no larger ones."""


def write(place: int) -> str:
    """`{"prediction": 12}`."""
    return json.dumps({KEY: place})


def read(text: str) -> int | None:
    """The place that an answer names; None if it names none.

    The first {...} of the text is read as a Python or JSON object, and of several places with commas between them the
    first counts. Whatever is not a whole number of 18 digits at most then is no place, and so is wrong.
    """
    found = re.search(r"\{[^{}]*\}", text)
    if not found or len(found[0]) > LONGEST:
        return None
    value = _object(found[0]).get(KEY)
    if isinstance(value, str):
        value = value.split(",")[0].strip()
        return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < BOUND else None


def next_place(prediction: str, reference: str) -> dict[str, float]:
    """The scorer of next places: `acc_at_1` (Acc@1 of the row, 0 or 1) and `valid` (1 if the answer names a place).

    Raises UserError for a reference that names none.
    """
    expected, named = read(reference), read(prediction)
    if expected is None:
        raise UserError(f"evaluation.scorer: next_place needs references like {write(12)}, not {reference[:60]!r}")
    return {"acc_at_1": float(named == expected), "valid": float(named is not None)}


def _object(text: str) -> dict[str, object]:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    return {}
