"""Scorers of the evidence's tasks, for `evaluation.scorer`: evidence.scorers:final_number, evidence.scorers:yes_no.

The commands in pipelines/ find them by these names, since Python looks for modules beside the script that it runs.
"""

import re
from decimal import Decimal

from olora_ray.common.errors import UserError

NUMBER = r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?"
MARKED = re.compile(rf"####\s*({NUMBER})")
ANY = re.compile(NUMBER)


def final_number(prediction: str, reference: str) -> dict[str, float]:
    """Compare the numbers behind the last `####`; a reference without one is a UserError.

    exact_match asks for the form as well, last_number takes whatever number comes last: a model that was never told
    to write `####` can have it right.
    """
    expected = marked_number(reference)
    if expected is None:
        raise UserError(f"evaluation.scorer: final_number needs a reference with #### and a number, not {reference!r}")
    return {
        "exact_match": float(marked_number(prediction) == expected),
        "last_number": float(_last(ANY.findall(prediction)) == expected),
    }


def yes_no(prediction: str, reference: str) -> dict[str, float]:
    """Compare the first words, whatever their case; `answered` says whether it was yes or no at all.

    A reference that is neither is a UserError.
    """
    expected, found = _first_word(reference), _first_word(prediction)
    if expected not in ("yes", "no"):
        raise UserError(f"evaluation.scorer: yes_no needs yes or no as the reference, not {reference!r}")
    return {"exact_match": float(found == expected), "answered": float(found in ("yes", "no"))}


def marked_number(text: str) -> Decimal | None:
    """The number behind the last `####`, 1,000 as 1000 and 57.0 as 57; None if there is none."""
    return _last(MARKED.findall(text))


def number(text: str) -> Decimal | None:
    """A text that is a number and nothing else; None for another."""
    return _last([text.strip()]) if ANY.fullmatch(text.strip()) else None


def _last(numbers: list[str]) -> Decimal | None:
    return Decimal(re.sub("[$,]", "", numbers[-1])) if numbers else None


def _first_word(text: str) -> str:
    found = re.match(r"\W*(\w*)", text.casefold())
    return found[1] if found else ""
