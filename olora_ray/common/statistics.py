"""Statistics of the project: intervals of differences between models, over rows, groups of rows, and seeds.

`difference` resamples groups of rows, for two models (a paired bootstrap). `crossed` is for several seeds of two
methods. d[s, r] = loss of a method - loss of the baseline, with seed s on row r. Seeds and rows are both samples:
another seed and other rows would have given another mean. In the two-way random-effects model

    d[s, r] = mu + seed_s + row_r + rest_sr

the variance of the mean over S seeds and R rows is estimated by (MS_seed + MS_row - MS_rest) / (S R), and its degrees
of freedom after Satterthwaite (Biometrics Bulletin 2, 1946); Searle, Casella, McCulloch, "Variance Components" (1992),
section 4.4. An interval over the rows alone (a bootstrap, or a t test of one run) ignores seed_s and is too short:
tests/contrib/comparison/test_statistics.py measures by how much.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Numbers = Sequence[float] | Values
Row = TypeVar("Row")


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


# Paired bootstrap: the interval of a difference between two models, over the rows on which both were measured.


DRAWN = 2**20
"""Number of groups drawn at once: 8 MiB of indices."""


def difference(
    ours: Numbers,
    theirs: Numbers,
    weights: Numbers | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    of: Callable[[Values], Values] | None = None,
    groups: Sequence[int] | NDArray[np.int64] | None = None,
) -> Interval:
    """Return the difference of the means, ours - theirs, with its bootstrap interval of confidence `level`.

    All sequences have one value per row, in the same order of rows. `weights` are positive (None: all equal). `groups`
    has the group number of each row (None: each row is its own group). `of` is applied to each mean before the
    difference is taken (np.exp of a mean loss: perplexity). A single group gives an interval of width 0. The same
    arguments give the same bits.
    """
    pair = np.array([ours, theirs], dtype=np.float64)  # (2, rows)
    weight = np.ones(pair.shape[-1])
    if weights is not None:
        weight = np.asarray(weights, dtype=np.float64)
    group = np.arange(weight.size)
    if groups is not None:
        group = np.unique(np.asarray(groups), return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    count = int(group.max()) + 1
    # At most 2000 groups, to bound the time of the draws. Groups that are merged at random stay independent.
    if count > 2000:
        group = (rng.permutation(count) % 2000)[group]
        count = 2000
    rows = np.stack([*(pair * weight), weight])
    # (3, groups): over each group, the weighted values of both models and the weights.
    sums: Values = np.stack([np.bincount(group, row, count) for row in rows])
    curve = of or (lambda means: means)
    drawn = curve(_means(sums, draws, rng))  # (2, draws)
    mean = curve(pair @ weight / weight.sum())
    return _interval(drawn[0] - drawn[1], float(mean[0] - mean[1]), count, level)


def resampled(
    metric: Callable[[Sequence[Row]], float],
    rows: Sequence[tuple[Row, Row]],
    groups: Sequence[int] | NDArray[np.int64],
    level: float = 0.95,
    draws: int = 500,
) -> Interval:
    """Return the difference of a metric that is no mean over rows, such as macro F1, with its bootstrap interval.

    `rows` has our row and theirs, and `groups` the group number of each. A metric may take long, so there are fewer
    draws than in `difference`.
    """

    def shift(drawn: Iterable[int]) -> float:
        ours, theirs = zip(*(rows[number] for number in drawn), strict=True)
        return metric([*ours]) - metric([*theirs])

    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(group.max()) + 1
    members = [np.flatnonzero(group == number).tolist() for number in range(count)]
    rng = np.random.default_rng(0)
    spread = []
    for _ in range(draws):
        drawn = chain.from_iterable(members[number] for number in rng.integers(count, size=count))
        spread.append(shift(drawn))
    return _interval(np.array(spread), shift(range(len(rows))), count, level)


def _interval(spread: Values, middle: float, count: int, level: float) -> Interval:
    """Return the interval of a difference from its draws (draws,) over `count` groups."""
    tail = (1 - level) / 2
    widening = 1.0
    student = 0.0
    if count > 1:
        from scipy.special import ndtr  # type: ignore[import-untyped] # half a second

        # Draws from few groups spread less than the groups' population, by sqrt((count - 1) / count), and have normal
        # tails instead of Student's. So fewer draws than (1 - level) / 2 may lie beyond each bound.
        widening = math.sqrt(count / (count - 1))
        student = quantile(count - 1, level)
        tail = float(ndtr(-widening * student))
    low, high = map(float, np.quantile(spread, [tail, 1 - tail]))
    # With very few groups, or at a level near 1, hardly a draw lies beyond such bounds. Then Student's t widens them.
    if count > 1 and (2.0 ** (1 - count) > 1 - level or spread.size * (1 - level) < 40):
        half = float(spread.std() * widening * student)
        low = min(low, middle - half)
        high = max(high, middle + half)
    return Interval(middle, low, high)


def _means(sums: Values, draws: int, rng: np.random.Generator) -> Values:
    """Return the weighted means of both models (2, draws) over groups drawn with replacement."""
    count = sums.shape[1]
    at_once = max(1, DRAWN // count)
    parts = []
    for start in range(0, draws, at_once):
        chosen = rng.integers(count, size=(min(at_once, draws - start), count))
        totals = np.stack([row[chosen].sum(-1) for row in sums])
        parts.append(totals[:2] / totals[2])
    return np.concatenate(parts, axis=1)


def share(part: float, rows: int) -> Interval:
    """Return the share `part` of independent rows with its 95% interval after Wilson.

    Unlike the interval of a mean, it has a width where all rows agree.
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped] # a second

    bounds = binomtest(round(part * rows), rows).proportion_ci(method="wilson")
    return Interval(part, bounds.low, bounds.high)


# Seeds and rows as samples: the mean difference of two methods.


@dataclass(frozen=True)
class Difference:
    mean: float
    error: float
    """Standard error of the mean; infinite if it cannot be known."""
    freedom: float

    def interval(self, level: float = 0.95) -> Interval:
        half = self.half(level)
        return Interval(self.mean, self.mean - half, self.mean + half)

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
    by_seed = values.mean(axis=1) - mean
    by_row = values.mean(axis=0) - mean
    rest = values - mean - by_seed[:, None] - by_row
    free = (seeds - 1, rows - 1, (seeds - 1) * (rows - 1))
    squares = (
        rows * np.square(by_seed).sum(),
        seeds * np.square(by_row).sum(),
        np.square(rest).sum(),
    )
    parts = [float(square) / degrees for square, degrees in zip(squares, free, strict=True)]
    of_seed, of_row, of_rest = parts
    variance = max(of_seed + of_row - of_rest, of_seed, of_row)
    spread = sum(part**2 / degrees for part, degrees in zip(parts, free, strict=True))
    freedom = float(free[0])
    if spread > 0:
        freedom = max(1.0, min(variance**2 / spread, float(free[2])))
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
    from scipy.special import stdtrit  # half a second

    return -float(stdtrit(freedom, (1 - level) / 2))
