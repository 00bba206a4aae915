"""The scorer of the evidence's rows, for `evaluation.scorer`: evidence.scorers:final_number.

The commands in pipelines/ find it by this name, because Python looks for modules beside the script that it runs.
"""

import re
from decimal import Decimal

from olora_ray.common.errors import UserError

NUMBER = r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?"
MARKED = re.compile(rf"####\s*({NUMBER})")
ANY = re.compile(NUMBER)


def final_number(prediction: str, reference: str) -> dict[str, float]:
    """Compare the numbers after the last `####`; raises UserError for a reference without one.

    exact_match also checks the form. last_number takes the last number of the answer, so a model that has not learned
    to write `####` can be right.
    """
    expected = marked_number(reference)
    if expected is None:
        raise UserError(
            f"evaluation.scorer: final_number needs a reference with #### and a number, not {reference!r}"
        )
    return {
        "exact_match": float(marked_number(prediction) == expected),
        "last_number": float(_last(ANY.findall(prediction)) == expected),
    }


def marked_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, 1,000 as 1000 and 57.0 as 57; None if there is none."""
    return _last(MARKED.findall(text))


def number(text: str) -> Decimal | None:
    """Return the number that is the whole text; None for other texts."""
    # fullmatch, because a text such as "12 apples" is no number.
    return _last([text.strip()]) if ANY.fullmatch(text.strip()) else None


def _last(numbers: list[str]) -> Decimal | None:
    return Decimal(re.sub("[$,]", "", numbers[-1])) if numbers else None
