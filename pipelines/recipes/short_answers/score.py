"""The scorer of the recipe, for `evaluation.scorer`: recipes.short_answers.score:short.

The commands find it by this name, because Python looks for modules in pipelines/, beside the script that it runs.
"""

import re


def short(prediction: str, reference: str) -> dict[str, float]:
    """Score if an answer has at most two sentences, and if its numbers are those of the right answer."""
    sentences = len(re.findall(r"[.!?](?:\s|$)", prediction.strip()))
    brief = 1 <= sentences <= 2
    right = re.findall(r"\d+", prediction) == re.findall(r"\d+", reference)
    return {
        "brief": float(brief),
        "right": float(right),
        "both": float(brief and right),
    }
