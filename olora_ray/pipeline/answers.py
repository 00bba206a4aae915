"""Answers of a run to held-out prompts, as text and as scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from olora_ray.cluster.spec import TrainResult
from olora_ray.config.schema import Config
from olora_ray.train import scoring

Scores = dict[str, dict[str, float]]
"""{"before": {name: mean}, "after": {name: mean}}."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with its answers, as text."""

    prompt: str
    reference: str
    before: str
    after: str


def answered(result: TrainResult, tokenizer: Any) -> list[Sample]:
    """The answers of a run as text."""

    def text(ids: Sequence[int], special: bool = False) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special)).strip()

    return [
        Sample(text(item.prompt, special=True), text(item.reference), text(item.before), text(item.after))
        for item in result.answers
    ]


def score(config: Config, answers: Sequence[Sample]) -> Scores:
    """Mean scores over the held-out answers before and after training; empty without a scorer."""
    if not config.evaluation.scorer or not answers:
        return {}
    judge = scoring.resolve(config.evaluation.scorer)
    return {
        "before": _means([judge(item.before, item.reference) for item in answers]),
        "after": _means([judge(item.after, item.reference) for item in answers]),
    }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
