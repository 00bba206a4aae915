"""One input for a reader, and what a reader must not do with it."""

from dataclasses import dataclass
from typing import Any


class WrongResult(Exception):
    """A reader took an input for something else than an oracle does."""


@dataclass(frozen=True)
class Case:
    """One input."""

    content: Any
    """What the reader's `read` understands."""
    refuse: bool = False
    """Whether reading it without an error is wrong."""


def agree(found: Any, expected: Any, what: str) -> None:
    """Raise WrongResult unless both are equal; of lists the first difference is named."""
    if isinstance(found, list) and isinstance(expected, list):
        for place, (one, two) in enumerate(zip(found, expected, strict=False)):
            agree(one, two, f"{what}, {place}")
        agree(len(found), len(expected), f"length of {what}")
    elif found != expected and repr(found) != repr(expected):  # NaN is like itself here
        raise WrongResult(f"{what}: {str(found)[:150]} instead of {str(expected)[:150]}")
