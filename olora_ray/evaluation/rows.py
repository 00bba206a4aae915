"""Held-out results of one model, row by row: the numbers that a comparison of two models is made of."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError

# Paired bootstrap: the interval of a difference between two models, over the rows that both were measured on.


Values = NDArray[np.float64]

DRAWN = 2**20
"""Groups drawn at once: 8 MiB of indices."""


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
    count = int(group.max()) + 1
    if count > 2000:  # put together at random until there are so many, which leaves them independent
        group, count = (rng.permutation(count) % 2000)[group], 2000
    rows = np.stack([*(pair * weight), weight])
    # (3, groups): over each group, the weighted values of both models and the weights.
    sums: Values = np.stack([np.bincount(group, row, count) for row in rows])
    curve = of or (lambda means: means)
    drawn = curve(_means(sums, draws, rng))  # (2, draws)
    mean = curve(pair @ weight / weight.sum())
    found, middle = drawn[0] - drawn[1], float(mean[0] - mean[1])
    tail, widening, quantile = (1 - level) / 2, 1.0, 0.0
    if count > 1:
        from scipy.special import ndtr, stdtrit  # type: ignore[import-untyped] # half a second

        # The share of the draws beyond each bound: fewer groups spread less than what they are drawn from.
        widening, quantile = math.sqrt(count / (count - 1)), float(stdtrit(count - 1, tail))
        tail = float(ndtr(widening * quantile))
    low, high = map(float, np.quantile(found, [tail, 1 - tail]))
    if count > 1 and 2.0 ** (1 - count) > 1 - level:  # so few that the draws end before the bounds: Student's t
        half = float(found.std() * widening * -quantile)
        low, high = min(low, middle - half), max(high, middle + half)
    return Interval(middle, low, high)


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


LOSS, PERPLEXITY, SCORE = "eval/loss", "eval/perplexity", "eval/"
HIGHEST = 80.0
"""Loss from which on the perplexity stays the same: its exponential would soon not be a number."""

Origin = tuple[int, int]
"""Number of a file, and the place of a row in it."""


@dataclass(frozen=True)
class Column:
    """A metric, row by row; all arrays (rows,)."""

    rows: NDArray[np.int64]
    """Numbers of the rows that have it, ascending."""
    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    """The metric is the mean of the values with these weights; of eval/perplexity it is the exponential of that."""


@dataclass(frozen=True)
class RowResults:
    """Held-out rows, in the order of their token store."""

    data: str
    """Digest of the token store: rows of two results are the same only if this is."""
    tokens: tuple[int, ...]
    """Supervised tokens of each row."""
    losses: tuple[float, ...]
    """Loss of each row, summed over its supervised tokens."""
    scores: Mapping[str, Mapping[int, float]]
    """Name of a score -> number of a row -> its score, of the rows that were answered and have it."""
    origins: tuple[Origin, ...]
    """Where each row comes from; several rows of the store may come from one row of a file."""

    def names(self) -> list[str]:
        """The metrics that there are."""
        return [LOSS, PERPLEXITY, *(f"{SCORE}{name}" for name in self.scores)]

    def metric(self, name: str) -> float:
        """The mean over all rows that have it: eval/loss (per token), eval/perplexity or eval/NAME of a score.

        Not a number if no row has it. Raises UserError for a name that there is not.
        """
        found = self.column(name)
        if not len(found.rows):
            return math.nan
        mean = math.fsum(found.values * found.weights) / math.fsum(found.weights)
        return math.exp(min(mean, HIGHEST)) if name == PERPLEXITY else mean

    def column(self, name: str) -> Column:
        """A metric's values; raises UserError for a name that there is not."""
        if name in (LOSS, PERPLEXITY):
            sizes = np.array(self.tokens, dtype=np.float64)
            return Column(np.arange(len(sizes)), np.array(self.losses, dtype=np.float64) / sizes, sizes)
        found = self.scores.get(name.removeprefix(SCORE)) if name.startswith(SCORE) else None
        if found is None:
            raise UserError(f"metric {name}: not measured on the held-out rows; there are {', '.join(self.names())}")
        rows = np.array(sorted(found), dtype=np.int64)
        return Column(rows, np.array([found[row] for row in rows.tolist()], dtype=np.float64), np.ones(len(rows)))

    def only(self, rows: Sequence[int]) -> "RowResults":
        """The results of some rows, given by their numbers; they are numbered anew."""
        place = {row: number for number, row in enumerate(rows)}
        scores = {
            name: {place[row]: value for row, value in found.items() if row in place}
            for name, found in self.scores.items()
        }
        return RowResults(
            self.data,
            tuple(self.tokens[row] for row in rows),
            tuple(self.losses[row] for row in rows),
            scores,
            tuple(self.origins[row] for row in rows),
        )

    def to_json(self) -> str:
        """The results as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RowResults":
        """Read `to_json` back; raises ValueError, KeyError, TypeError, AttributeError or OverflowError for others."""
        tree = json.loads(text)
        scores = {
            str(name): {int(row): float(value) for row, value in dict(found).items()}
            for name, found in dict(tree["scores"]).items()
        }
        tokens, losses = tuple(map(int, tree["tokens"])), tuple(map(float, tree["losses"]))
        origins = tuple((int(file), int(place)) for file, place in tree["origins"])
        if not len(tokens) == len(losses) == len(origins):
            raise ValueError("columns of different lengths")
        return cls(str(tree["data"]), tokens, losses, scores, origins)


@dataclass(frozen=True)
class Comparison:
    """A metric of two models on the rows that both have it on."""

    interval: Interval
    """Ours - theirs."""
    rows: int
    groups: int
    """Independent groups of these rows."""


def compare(
    name: str,
    ours: RowResults,
    theirs: RowResults,
    level: float = 0.95,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> Comparison:
    """The difference of a metric with its paired interval, over the rows that both models have it on.

    `groups` number the group of each row of the store; None: rows of the store that come from one row of a file are a
    group. Raises UserError for a metric that one of them has not, or if they were measured on other rows or tokens, or
    have the metric on no row both.
    """
    if ours.data != theirs.data or ours.origins != theirs.origins:
        raise UserError(
            "the two models were measured on other held-out tokens (other data, tokenizer or data settings):"
            " measure both on the same"
        )
    mine, other = ours.column(name), theirs.column(name)
    rows, here, there = np.intersect1d(mine.rows, other.rows, assume_unique=True, return_indices=True)
    if not len(rows):
        raise UserError(f"metric {name}: there is no held-out row on which both models have it")
    group = np.asarray(groups if groups is not None else numbered(ours.origins))[rows]
    curve = (lambda means: np.exp(np.minimum(means, HIGHEST))) if name == PERPLEXITY else None
    found = difference(
        mine.values[here], other.values[there], mine.weights[here], level, seed=seed, of=curve, groups=group
    )
    return Comparison(found, len(rows), len(np.unique(group)))


def numbered(keys: Sequence[object]) -> list[int]:
    """A number for each key, equal ones for equal keys: 0, 1, ... in the order in which they come."""
    known: dict[object, int] = {}
    return [known.setdefault(key, len(known)) for key in keys]
