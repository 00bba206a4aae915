"""Statistics of a comparison: the tuned rate of an arm, and the interval of a difference between two arms.

d[s, r] = loss of a method - loss of the baseline, with seed s on row r. Seeds and rows are both samples: another seed
and other rows would have given another mean. In the two-way random-effects model

    d[s, r] = mu + seed_s + row_r + rest_sr

the variance of the mean over S seeds and R rows is estimated by (MS_seed + MS_row - MS_rest) / (S R), and its degrees
of freedom after Satterthwaite (Biometrics Bulletin 2, 1946); Searle, Casella, McCulloch, "Variance Components" (1992),
section 4.4. An interval over the rows alone (a bootstrap, or a t test of one run) ignores seed_s and is too short:
tests/comparison/test_statistics.py measures by how much.

The best point of a grid of rates depends on luck: two arms with the same curve, each trained at its best point, would
be told apart in about 9% of comparisons, instead of 5%. So the tuned rate is the lowest point of the parabola, in log2
of the rate, through the best point and its neighbours: 6 to 7%.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def inside(self, relevant: float) -> bool:
        """True if the whole interval is closer to 0 than the smallest difference that matters."""
        return -relevant < self.low and self.high < relevant


@dataclass(frozen=True)
class Difference:
    """A mean difference and its uncertainty."""

    mean: float
    error: float
    """Standard error of the mean; infinite if it cannot be known."""
    freedom: float

    def interval(self, level: float = 0.95) -> Interval:
        half = self.half(level)
        return Interval(self.mean - half, self.mean + half)

    def half(self, level: float = 0.95) -> float:
        return self.error and self.error * quantile(self.freedom, level)


def crossed(values: Values) -> Difference:
    """Return the mean of `values`, (seeds, rows), with its error over seeds and rows; needs two of each.

    A variance component whose estimate is negative counts as 0, so the error is at least the error of the seeds alone
    and of the rows alone.
    """
    seeds, rows = values.shape
    if seeds < 2 or rows < 2:
        raise ValueError(f"at least two seeds and two rows are needed, not {seeds} and {rows}")
    mean = float(values.mean())
    by_seed, by_row = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - by_seed[:, None] - by_row
    free = (seeds - 1, rows - 1, (seeds - 1) * (rows - 1))
    squares = (rows * np.square(by_seed).sum(), seeds * np.square(by_row).sum(), np.square(rest).sum())
    of_seed, of_row, of_rest = (float(square) / degrees for square, degrees in zip(squares, free, strict=True))
    variance = max(of_seed + of_row - of_rest, of_seed, of_row)
    spread = sum(square**2 / degrees for square, degrees in zip((of_seed, of_row, of_rest), free, strict=True))
    freedom = max(1.0, min(variance**2 / spread, float(free[2]))) if spread > 0 else float(free[0])
    return Difference(mean, math.sqrt(variance / (seeds * rows)), freedom)


def per_token(losses: Values, tokens: Values) -> Values:
    """Return contributions of rows, (seeds, rows), with the mean: sum of losses / sum of tokens, averaged over seeds.

    `losses` (seeds, rows) are summed over the `tokens` (rows,) of each row. A mean per token is a ratio of two sums
    over rows; these are its linearised values (Cochran, "Sampling Techniques", section 6.2). A long row then adds to
    the error if its loss per token differs from the others', and not because it is long.
    """
    ratio = losses.sum(axis=1, keepdims=True) / tokens.sum()
    contributions: Values = ratio + (losses - ratio * tokens) / tokens.mean()
    return contributions


def simultaneous(level: float, count: int) -> float:
    """Return the confidence of each of `count` intervals so that all hold together with `level` (Bonferroni)."""
    return 1 - (1 - level) / max(1, count)


def quantile(freedom: float, level: float) -> float:
    """Return the t quantile of a two-sided interval with this confidence."""
    from scipy.special import stdtrit  # type: ignore[import-untyped] # half a second

    return -float(stdtrit(freedom, (1 - level) / 2))


def visible(spread: float, seeds: int, level: float) -> float:
    """Return half of the interval's width if the paired differences of seeds have this standard deviation."""
    return quantile(seeds - 1, level) * spread / math.sqrt(seeds)


def seeds_needed(spread: float, half: float, level: float) -> int | None:
    """Return the smallest number of seeds whose interval is at most +-`half`; None if 10,000 are too few."""
    return next((seeds for seeds in range(2, 10_001) if visible(spread, seeds, level) <= half), None)


Losses = Mapping[float, float]
"""Multiple of the arm's rate -> loss on the tuning rows after the last step; infinite for a training that broke off."""
_BROKE_OFF = 1e6
"""Loss of a neighbour that broke off: the lowest point then lies half-way to the other neighbour."""


@dataclass(frozen=True)
class Tuned:
    factor: float
    """The tuned rate as a multiple of the arm's rate, with two digits."""
    loss: float
    """Lowest loss of the grid."""
    inside: bool
    """True if the best point has neighbours on both sides."""
    diverged: int
    """Number of points that broke off, or ended above the base model."""


def tuned(losses: Losses, base: float) -> Tuned | None:
    """Return the tuned rate; None if every training broke off.

    `base` is the loss of the base model.
    """
    factors = sorted(losses)
    # Among equal losses `min` returns the first, so the smallest rate.
    best = min(factors, key=lambda factor: losses[factor])
    if not math.isfinite(losses[best]):
        return None
    inside = factors[0] < best < factors[-1]
    return Tuned(
        float(f"{vertex(losses, best) if inside else best:.2g}"),
        losses[best],
        inside,
        sum(not loss <= base for loss in losses.values()),
    )


def vertex(losses: Losses, best: float) -> float:
    """Return the lowest point of the parabola, in log2 of the factor, through `best` and its two neighbours."""
    factors, here = sorted(losses), sorted(losses).index(best)
    (left, above_left), (right, above_right) = (
        (math.log2(factor / best), min(losses[factor], _BROKE_OFF) - losses[best])
        for factor in (factors[here - 1], factors[here + 1])
    )
    # Through (0, 0), (left, above_left) and (right, above_right): y = a x^2 + b x, lowest at -b / (2 a).
    a = (above_right / right - above_left / left) / (right - left)
    b = above_left / left - a * left
    return float(best * 2.0 ** (-b / (2 * a))) if a > 0 else best
