"""Paired bootstrap: the interval of a difference between two models, over the rows that both were measured on.

Rows are drawn with replacement, the same ones for both models, and the difference of the two (weighted)
means is taken each time. What makes a row hard for both models then cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

DRAWN = 2**22
"""Rows drawn at once: 32 MiB of indices."""


@dataclass(frozen=True)
class Interval:
    """A difference and the bounds between which it lies with the asked confidence."""

    mean: float
    low: float
    high: float


def difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    of: Callable[[Values], Values] | None = None,
) -> Interval:
    """The difference of the means, ours - theirs, with its bootstrap percentile interval of this level.

    All three sequences have one value per row, rows in the same order; `weights` are positive (None: all
    equal). `of` is applied to each mean before the difference is taken (np.exp of a mean loss: perplexity).
    The same arguments give the same bits. Raises ValueError for sequences that are empty or differ in length.
    """
    pair = np.array([ours, theirs], dtype=np.float64)  # (2, rows)
    weight = np.ones(pair.shape[-1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if pair.ndim != 2 or not pair.size or weight.shape != pair.shape[1:]:
        raise ValueError(f"paired rows needed, not {len(ours)}, {len(theirs)} and {weight.size} weights")
    curve = of or (lambda means: means)
    drawn = curve(_means(pair, weight, draws, np.random.default_rng(seed)))  # (2, draws)
    mean = curve(pair @ weight / weight.sum())
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean[0] - mean[1]), float(low), float(high))


def _means(pair: Values, weight: Values, draws: int, rng: np.random.Generator) -> Values:
    """(2, draws) weighted means of both models over rows drawn with replacement."""
    rows = pair.shape[1]
    at_once = max(1, DRAWN // rows)
    weighted = pair * weight
    parts = []
    for start in range(0, draws, at_once):
        chosen = rng.integers(rows, size=(min(at_once, draws - start), rows))
        parts.append(weighted[:, chosen].sum(-1) / weight[chosen].sum(-1))
    return np.concatenate(parts, axis=1)
