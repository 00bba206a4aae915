"""Held-out results of one model, row by row: the numbers that a comparison of two models is made of."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from olora_ray.common.errors import UserError
from olora_ray.evaluation.bootstrap import Interval, difference

LOSS, PERPLEXITY, SCORE = "eval/loss", "eval/perplexity", "eval/"
HIGHEST = 80.0
"""Loss from which on the perplexity stays the same: its exponential would soon not be a number."""


@dataclass(frozen=True)
class RowResults:
    """Held-out rows, in the order of their token store."""

    data: str
    """Digest of the token store: rows of two results are the same only if this is."""
    tokens: tuple[int, ...]
    """Supervised tokens of each row."""
    losses: tuple[float, ...]
    """Loss of each row, summed over its supervised tokens."""
    scores: Mapping[str, tuple[float, ...]]
    """Name of a score -> the score of each row that was answered and has it."""

    def names(self) -> list[str]:
        """The metrics that there are."""
        return [LOSS, PERPLEXITY, *(f"{SCORE}{name}" for name in self.scores)]

    def metric(self, name: str) -> float:
        """The mean over all rows: eval/loss (per token), eval/perplexity or eval/NAME of a score.

        Raises UserError for a name that there is not.
        """
        values, weights = self.rows(name)
        mean = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(weights)
        return math.exp(min(mean, HIGHEST)) if name == PERPLEXITY else mean

    def rows(self, name: str) -> tuple[Sequence[float], Sequence[float]]:
        """(values, weights) whose weighted mean the metric is; for eval/perplexity, of which it is the exponential.

        Raises UserError for a name that there is not.
        """
        if name in (LOSS, PERPLEXITY):
            return [loss / size for loss, size in zip(self.losses, self.tokens, strict=True)], self.tokens
        values = self.scores.get(name.removeprefix(SCORE)) if name.startswith(SCORE) else None
        if values is None:
            raise UserError(f"metric {name}: not measured on the held-out rows; there are {', '.join(self.names())}")
        return values, [1.0] * len(values)

    def to_json(self) -> str:
        """The results as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RowResults":
        """Read `to_json` back; raises ValueError, KeyError or TypeError for anything else."""
        tree = json.loads(text)
        scores = {str(name): tuple(map(float, values)) for name, values in dict(tree["scores"]).items()}
        return cls(str(tree["data"]), tuple(map(int, tree["tokens"])), tuple(map(float, tree["losses"])), scores)


def compare(name: str, ours: RowResults, theirs: RowResults, level: float = 0.95, seed: int = 0) -> Interval:
    """The difference of a metric, ours - theirs, with its paired interval.

    Raises UserError for a metric that one of them has not, or if they were measured on other rows or tokens.
    """
    if ours.data != theirs.data:
        raise UserError(
            "the two models were measured on other held-out tokens (other data, tokenizer or data settings):"
            " measure both on the same"
        )
    (mine, weights), (other, _) = ours.rows(name), theirs.rows(name)
    curve = (lambda means: np.exp(np.minimum(means, HIGHEST))) if name == PERPLEXITY else None
    return difference(mine, other, weights, level, seed=seed, of=curve)
