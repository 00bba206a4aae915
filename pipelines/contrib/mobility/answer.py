"""The form of a model's answer, and how it is read: MoBLLM's (2503.16553) form and rule.

The commands in pipelines/ import the scorer as mobility.answer:next_place, so this module imports nothing from its
folder.
"""

import ast
import json
import re

from olora_ray.common.errors import UserError

KEY = "prediction"
LONGEST = 400
"""Longest braces that are parsed, in characters: Python's parser may fail on longer output of a model."""
BOUND = 10**18
"""Larger numbers are no place: a model may repeat a digit without end, and arrays of int64 hold no larger numbers."""


def write(place: int) -> str:
    """Return `{"prediction": 12}`."""
    return json.dumps({KEY: place})


def read(text: str) -> int | None:
    """Return the place that an answer names; None if it names none.

    The first {...} of the text is read as a Python or JSON object. If its value lists several places with commas, the
    first counts. A value that is no whole number of at most 18 digits is no place, and so is wrong.
    """
    braces = re.search(r"\{[^{}]*\}", text)
    if not braces or len(braces[0]) > LONGEST:
        return None
    value = _object(braces[0]).get(KEY)
    if isinstance(value, str):
        value = value.split(",")[0].strip()
        return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else None
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < BOUND
        else None
    )


def next_place(prediction: str, reference: str) -> dict[str, float]:
    """Score a next place: `acc_at_1` (Acc@1 of the row, 0 or 1) and `valid` (1 if the answer names a place).

    Raises UserError for a reference that names none.
    """
    expected, named = read(reference), read(prediction)
    if expected is None:
        raise UserError(
            f"evaluation.scorer: next_place needs references like {write(12)}, not {reference[:60]!r}"
        )
    return {"acc_at_1": float(named == expected), "valid": float(named is not None)}


def _object(text: str) -> dict[str, object]:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        # A model writes anything. Python's parser answers some of it with a RecursionError or MemoryError.
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    return {}
