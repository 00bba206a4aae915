"""The scorer of the recipe, for `evaluation.scorer`: recipes.tone.score:tone.

The commands find it by this name, because Python looks for modules in pipelines/, beside the script that it runs.
"""

import re
from pathlib import Path

import yaml

PRODUCTS = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))[
    "facts"
]["product"]
STIFF = re.compile(
    r"\b(dear|regret|inform|advised|kindly|hesitate|require[ds]?|unable|prior to|subsequent|hereby|request\w*|yours"
    r"|regards|sincerely|cannot|do(es)? not|we are|we wish|should you|amounts|pleased|scheduled|disposal|apologise)\b",
    re.IGNORECASE,
)
FACT = re.compile(rf"\d+|\b[A-Z][a-z]+day\b|{'|'.join(PRODUCTS)}")


def tone(prediction: str, reference: str) -> dict[str, float]:
    """Score the form and words of the house, and whether exactly the numbers, days and products are kept."""
    first, *_, last = reference.splitlines()
    framed = prediction.startswith(first) and prediction.rstrip().endswith(last)
    in_tone = framed and not STIFF.search(prediction)
    kept = facts(prediction) == facts(reference)
    return {"in_tone": float(in_tone), "facts_kept": float(kept), "both": float(in_tone and kept)}


def facts(text: str) -> list[str]:
    return sorted(FACT.findall(text))
