"""Statistics of a comparison: the interval of a difference measured on the same rows with the same seeds.

d[s, r] = loss of a method - loss of the baseline, of seed s on row r. Both are samples: another seed and other rows
would have given another mean. In the two-way random-effects model

    d[s, r] = mu + seed_s + row_r + rest_sr

the variance of the mean over S seeds and R rows is estimated by (MS_seed + MS_row - MS_rest) / (S R), and its degrees
of freedom after Satterthwaite (Biometrics Bulletin 2, 1946); Searle, Casella, McCulloch, "Variance Components" (1992),
section 4.4. An interval over the rows alone (a bootstrap, or a t test of one run) knows nothing of seed_s and is too
short: tests/comparison/test_statistics.py measures by how much.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """The bounds between which a difference lies with the asked confidence."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value is not excluded."""
        return self.low <= value <= self.high

    def inside(self, relevant: float) -> bool:
        """Whether all of it is nearer to 0 than the smallest difference that matters: the two are equivalent."""
        return -relevant < self.low and self.high < relevant


@dataclass(frozen=True)
class Difference:
    """A mean difference and how sure it is."""

    mean: float
    error: float
    """Standard error of the mean; infinite where it cannot be known."""
    freedom: float
    """Degrees of freedom of the t distribution."""

    def interval(self, level: float = 0.95) -> Interval:
        """The interval of this confidence; infinite where the error is."""
        half = self.half(level)
        return Interval(self.mean - half, self.mean + half)

    def half(self, level: float = 0.95) -> float:
        """Half of the interval's width."""
        from scipy.special import stdtrit  # type: ignore[import-untyped] # half a second

        return self.error and self.error * -float(stdtrit(self.freedom, (1 - level) / 2))

    def p(self) -> float:
        """Two-sided p value of "there is no difference"."""
        from scipy.special import stdtr

        if not self.error:
            return float(not self.mean)
        return 2 * float(stdtr(self.freedom, -abs(self.mean) / self.error))


def crossed(values: Values) -> Difference:
    """The mean of `values`, (seeds, rows), with its error over seeds and rows; needs two of each.

    A variance component that is estimated below 0 counts as 0, so the error is at least that of the seeds alone and
    that of the rows alone.
    """
    seeds, rows = values.shape
    if seeds < 2 or rows < 2:
        raise ValueError(f"at least two seeds and two rows are needed, not {seeds} and {rows}")
    mean = float(values.mean())
    by_seed, by_row = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - by_seed[:, None] - by_row
    free = (seeds - 1, rows - 1, (seeds - 1) * (rows - 1))
    squares = (rows * np.square(by_seed).sum(), seeds * np.square(by_row).sum(), np.square(rest).sum())
    of_seed, of_row, of_rest = (float(one) / degrees for one, degrees in zip(squares, free, strict=True))
    variance = max(of_seed + of_row - of_rest, of_seed, of_row)
    spread = sum(one**2 / degrees for one, degrees in zip((of_seed, of_row, of_rest), free, strict=True))
    freedom = max(1.0, min(variance**2 / spread, float(free[2]))) if spread > 0 else float(free[0])
    return Difference(mean, math.sqrt(variance / (seeds * rows)), freedom)


def per_token(losses: Values, tokens: Values) -> Values:
    """Row contributions, (seeds, rows), whose mean is sum of losses / sum of tokens, averaged over seeds.

    `losses` (seeds, rows) are summed over the `tokens` (rows,) of each row. A mean per token is a ratio of two sums
    over rows; these are its linearised values (Cochran, "Sampling Techniques", section 6.2): a long row does not
    spread the mean for being long, but for being unlike the others per token.
    """
    ratio = losses.sum(axis=1, keepdims=True) / tokens.sum()
    contributions: Values = ratio + (losses - ratio * tokens) / tokens.mean()
    return contributions


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values after Holm (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    # Each at least as large as those of smaller p values.
    steps = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    return [float(min(1.0, steps[place])) for place in np.argsort(order)]


def simultaneous(level: float, count: int) -> float:
    """Confidence of each of `count` intervals such that all of them hold together with that of `level` (Bonferroni).

    Bonferroni, not Holm: Holm gives the smallest difference the widest error budget, and that is the one we would
    declare equivalent.
    """
    return 1 - (1 - level) / max(1, count)
