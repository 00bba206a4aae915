"""Statistics of a comparison: the interval of a difference measured on the same rows with the same seeds.

d[s, r] = loss of a method - loss of the baseline, with seed s on row r. Seeds and rows are both samples: another seed
and other rows would have given another mean. In the two-way random-effects model

    d[s, r] = mu + seed_s + row_r + rest_sr

the variance of the mean over S seeds and R rows is estimated by (MS_seed + MS_row - MS_rest) / (S R), and its degrees
of freedom after Satterthwaite (Biometrics Bulletin 2, 1946); Searle, Casella, McCulloch, "Variance Components" (1992),
section 4.4. An interval over the rows alone (a bootstrap, or a t test of one run) ignores seed_s and is too short:
tests/comparison/test_statistics.py measures by how much.
"""

import math
from collections.abc import Sequence
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
    """Degrees of freedom of the t distribution."""

    def interval(self, level: float = 0.95) -> Interval:
        """Return the interval with this confidence; infinite if the error is."""
        half = self.half(level)
        return Interval(self.mean - half, self.mean + half)

    def half(self, level: float = 0.95) -> float:
        from scipy.special import stdtrit  # type: ignore[import-untyped] # half a second

        return self.error and self.error * -float(stdtrit(self.freedom, (1 - level) / 2))

    def p(self) -> float:
        """Return the two-sided p value of "there is no difference"."""
        from scipy.special import stdtr

        if not self.error:
            return float(not self.mean)
        return 2 * float(stdtr(self.freedom, -abs(self.mean) / self.error))


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted after Holm (Scandinavian Journal of Statistics 6, 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    # An adjusted p value is at least as large as the adjusted values of all smaller p values.
    steps = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    return [float(min(1.0, steps[rank])) for rank in np.argsort(order)]


def simultaneous(level: float, count: int) -> float:
    """Return the confidence of each of `count` intervals so that all hold together with `level` (Bonferroni)."""
    # Bonferroni, not Holm: Holm gives the smallest difference the widest error budget, and that is the one we would
    # declare equivalent.
    return 1 - (1 - level) / max(1, count)
