"""What to do about rows that were rejected, in words: the last part of the message that ends a run."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

MEND = "mend or remove them"
TOKENIZER = "put the model's own tokenizer into its folder, or give it embeddings for all tokens of this one"
COLUMNS = ("missing_field", "wrong_type", "not_an_object")
"""Reasons that mean that a format does not fit the file."""


def remedy(reasons: Mapping[str, int], rejected: Iterable[dict[str, Any]], rows: int, where: str) -> str:
    """What mends most of the rejected rows; where some of the `rows` can be used, also how to allow as many.

    `where` names the setting of their sources.
    """
    bad = sum(reasons.values())
    most = max(reasons, key=lambda reason: reasons[reason])
    if most == "too_long":
        first = _longer(rejected)
    elif most == "no_embedding":
        first = TOKENIZER
    elif most in COLUMNS:
        first = f"name the columns in the fields of {where.removeprefix('held out of ')}, or set another format there"
    else:
        first = MEND
    return first if bad == rows else f"{first}, or allow as many with data.max_rejected={_at_least(bad / rows):g}"


def _longer(rejected: Iterable[dict[str, Any]]) -> str:
    """The length at which no row is too long; it stands in the messages of those that are."""
    lengths = (int(found[1]) for entry in rejected if (found := re.match(r"(\d+) tokens", str(entry["message"]))))
    longest = max(lengths, default=None)
    return f"raise data.max_length, to {longest} for all of them" if longest else "raise data.max_length"


def _at_least(share: float) -> float:
    """The share, rounded up to two digits that a person would type."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(1.0, round(math.ceil(share / unit - 1e-9) * unit, 12))
