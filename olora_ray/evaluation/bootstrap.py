"""Paired bootstrap: the interval of a difference between two models, over the rows that both were measured on.

Groups of rows are drawn with replacement, the same ones for both models, and the difference of the two (weighted)
means is taken each time. What makes a row hard for both models then cancels, and rows that are alike, because they
come from one document or customer, are drawn together or not at all (the cluster bootstrap).

The bounds are quantiles of the draws. With n groups these are too narrow by sqrt((n - 1) / n) and know nothing of
Student's t, so the quantiles are moved outwards by both: Hesterberg, "What Teachers Should Know About the Bootstrap"
(The American Statistician 69, 2015), section 5.3.

No draw lies beyond the groups themselves, and all n of them are on one side of the truth by luck in 2 of 2^n cases: of
two to five groups no quantile can hold it in 95 %. There the bounds are those of Student's t where these are wider.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

DRAWN = 2**20
"""Groups drawn at once: 8 MiB of indices."""
POOLED = 2000
"""More groups than this are put together at random until there are so many, which leaves them independent."""


@dataclass(frozen=True)
class Interval:
    """A difference and the bounds between which it lies with the asked confidence."""

    mean: float
    low: float
    high: float


def difference(
    ours: Sequence[float] | Values,
    theirs: Sequence[float] | Values,
    weights: Sequence[float] | Values | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    of: Callable[[Values], Values] | None = None,
    groups: Sequence[int] | NDArray[np.int64] | None = None,
) -> Interval:
    """The difference of the means, ours - theirs, with its bootstrap interval of this level.

    All sequences have one value per row, rows in the same order; `weights` are positive (None: all equal), `groups`
    number the group of each row (None: each row is one). `of` is applied to each mean before the difference is taken
    (np.exp of a mean loss: perplexity). One group alone gives an interval of width 0. The same arguments give the same
    bits. Raises ValueError for sequences that are empty or differ in length.
    """
    pair = np.array([ours, theirs], dtype=np.float64)  # (2, rows)
    weight = np.ones(pair.shape[-1]) if weights is None else np.asarray(weights, dtype=np.float64)
    group = np.arange(weight.size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if pair.ndim != 2 or not pair.size or weight.shape != pair.shape[1:] or group.shape != weight.shape:
        raise ValueError(
            f"paired rows needed, not {len(ours)}, {len(theirs)}, {weight.size} weights and {group.size} groups"
        )
    rng = np.random.default_rng(seed)
    sums = _sums(np.stack([*(pair * weight), weight]), group, rng)
    curve = of or (lambda means: means)
    drawn = curve(_means(sums, draws, rng))  # (2, draws)
    mean = curve(pair @ weight / weight.sum())
    found, middle, count = drawn[0] - drawn[1], float(mean[0] - mean[1]), sums.shape[1]
    tail = _tail(level, count)
    low, high = map(float, np.quantile(found, [tail, 1 - tail]))
    if count > 1 and 2.0 ** (1 - count) > 1 - level:
        half = _half(found, level, count)
        low, high = min(low, middle - half), max(high, middle + half)
    return Interval(middle, low, high)


def _sums(rows: Values, group: NDArray[np.int64], rng: np.random.Generator) -> Values:
    """(3, groups) sums over each group of the weighted values of both models, and of the weights."""
    count = int(group.max()) + 1
    if count > POOLED:
        group, count = (rng.permutation(count) % POOLED)[group], POOLED
    return np.stack([np.bincount(group, row, count) for row in rows])


def _means(sums: Values, draws: int, rng: np.random.Generator) -> Values:
    """(2, draws) weighted means of both models over groups drawn with replacement."""
    count = sums.shape[1]
    at_once = max(1, DRAWN // count)
    parts = []
    for start in range(0, draws, at_once):
        chosen = rng.integers(count, size=(min(at_once, draws - start), count))
        totals = np.stack([row[chosen].sum(-1) for row in sums])
        parts.append(totals[:2] / totals[2])
    return np.concatenate(parts, axis=1)


def _tail(level: float, count: int) -> float:
    """The share of the draws that lies beyond each bound."""
    from scipy.special import ndtr, stdtrit  # type: ignore[import-untyped] # half a second

    if count < 2:
        return (1 - level) / 2
    return float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - level) / 2)))


def _half(found: Values, level: float, count: int) -> float:
    """Half of the width that Student's t gives an interval, with the spread of the draws."""
    from scipy.special import stdtrit

    return float(found.std() * math.sqrt(count / (count - 1)) * -stdtrit(count - 1, (1 - level) / 2))
