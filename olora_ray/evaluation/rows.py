"""Held-out results of one model, row by row, and the comparison of two models on the same rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from olora_ray.common.errors import UserError
from olora_ray.common.statistics import Interval, difference, resampled
from olora_ray.common.text import plural
from olora_ray.train.scoring import Judge, Row

LOSS = "eval/loss"
PERPLEXITY = "eval/perplexity"
PAIRS_LOSS = "eval/pairs/loss"
SCORE = "eval/"
HIGHEST = 80.0
"""A larger loss counts as this in a perplexity, because its exponential would soon overflow."""

Origin = tuple[int, int]
"""(number of a file, position of a row in it)."""


@dataclass(frozen=True)
class Column:
    """A metric, row by row; all arrays have shape (rows,)."""

    rows: NDArray[np.int64]
    """Indices of the rows that have the metric, ascending."""
    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    """The metric is the weighted mean of the values; eval/perplexity is the exponential of the weighted mean."""
    over_all: Callable[[Sequence[Row]], float] | None = None
    """The metric of answered rows, if it is no mean; the values are then NaN."""


@dataclass(frozen=True)
class RowResults:
    """Results on the held-out rows, in the order of their token store."""

    data: str
    """Digest of the token store; rows of two results are the same only if their digests are equal."""
    tokens: tuple[int, ...]
    """Weight of each row in the mean loss (`RowNumbers.weight`): its supervised tokens without rejected answers."""
    losses: tuple[float, ...]
    """Loss of each row: the sum, for a mean per `tokens`."""
    scores: Mapping[str, Mapping[int, float]]
    """Name of a score -> index of a row -> value, for the rows that were answered and have the score. The results of
    preference pairs are scores, too: pairs/loss, pairs/preferred, ..."""
    origins: tuple[Origin, ...]
    """Origin of each row; several rows of the store may come from one row of a file."""
    perplexity: bool = True
    """True if the exponential of the mean loss is a perplexity (`Objective.perplexity`)."""
    answers: Mapping[int, Row] = field(default_factory=dict)
    """Index of a row -> what a scorer of all answers takes; empty without such a scorer."""
    scorer: str | None = None
    """evaluation.scorer, if it has such a scorer."""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.losses) == len(self.origins):
            raise ValueError("columns of different lengths")

    def names(self) -> list[str]:
        names = [LOSS]
        if self.perplexity:
            names.append(PERPLEXITY)
        scores = [*self.scores]
        if self.scorer:
            scores += Judge(self.scorer).over_all([*self.answers.values()])
        return names + [f"{SCORE}{name}" for name in scores]

    def metric(self, name: str) -> float:
        """Return the mean over all rows that have the metric: eval/loss (per token), eval/perplexity or eval/SCORE.

        NaN if no row has it. Raises UserError if the metric was not measured.
        """
        column = self.column(name)
        if not len(column.rows):
            return math.nan
        if column.over_all:
            return column.over_all([*self.answers.values()])
        mean = math.fsum(column.values * column.weights) / math.fsum(column.weights)
        if name == PERPLEXITY:
            return math.exp(min(mean, HIGHEST))
        return mean

    def column(self, name: str) -> Column:
        """Return the values of a metric; raises UserError if it was not measured."""
        if name == LOSS or (name == PERPLEXITY and self.perplexity):
            sizes = np.array(self.tokens, dtype=np.float64)
            losses = np.array(self.losses, dtype=np.float64)
            # An answer that people rejected has no right tokens.
            rows = np.flatnonzero(sizes)
            return Column(rows, losses[rows] / sizes[rows], sizes[rows])
        values = None
        if name.startswith(SCORE):
            values = self.scores.get(name.removeprefix(SCORE))
        if values is None and self.scorer and name in self.names():
            rows = np.array(sorted(self.answers), dtype=np.int64)
            blank = np.full(len(rows), math.nan)
            metric = partial(Judge(self.scorer).number, name.removeprefix(SCORE))
            return Column(rows, blank, blank, metric)
        if values is None:
            raise UserError(
                f"metric {name}: not measured on the held-out rows; use one of {', '.join(self.names())}"
            )
        rows = np.array(sorted(values), dtype=np.int64)
        return Column(
            rows,
            np.array([values[row] for row in rows.tolist()], dtype=np.float64),
            np.ones(len(rows)),
        )

    def pairs(self) -> list[int]:
        """Return the rows that are preference pairs."""
        return sorted(self.scores.get(PAIRS_LOSS.removeprefix(SCORE), ()))

    def grouped(self, names: Sequence[object]) -> "RowResults":
        """Return the results with all rows of one name as a group, as if they came from one row of a file."""
        return replace(self, origins=tuple((0, number) for number in numbered(names)))

    def only(self, rows: Sequence[int]) -> "RowResults":
        """Return the results of the rows with these indices, which are numbered 0, 1, ... in the given order."""
        position = {row: number for number, row in enumerate(rows)}
        scores = {}
        for name, values in self.scores.items():
            scores[name] = {position[row]: values[row] for row in values if row in position}
        answers = {position[row]: each for row, each in self.answers.items() if row in position}
        return replace(
            self,
            tokens=tuple(self.tokens[row] for row in rows),
            losses=tuple(self.losses[row] for row in rows),
            scores=scores,
            origins=tuple(self.origins[row] for row in rows),
            answers=answers,
        )

    def gain(self, theirs: "RowResults", metric: str, level: float = 0.95) -> "Comparison":
        """Return how much better these are (above 0: better), with the paired interval. Raises as `compare`."""
        comparison = compare(metric, self, theirs, level)
        if not lower_is_better(metric):
            return comparison
        was = comparison.interval
        turned = Interval(0.0 - was.mean, 0.0 - was.high, 0.0 - was.low)  # -x would give -0.0
        return replace(comparison, interval=turned)


@dataclass(frozen=True)
class Comparison:
    interval: Interval
    """Ours - theirs."""
    rows: int
    groups: int
    """Number of independent groups of these rows."""

    def shown(self, level: float) -> str:
        """Return a gain in words; `level` is that of its interval."""
        interval = self.interval
        rows = plural(self.rows, "row")
        if self.groups < self.rows:
            rows += f" in {plural(self.groups, 'group')}"
        change = "worse" if interval.mean < 0 else "improved"
        return (
            f"{change} by {abs(interval.mean):.4f} ({100 * level:.4g}% interval of the improvement"
            f" {interval.low:.4f} to {interval.high:.4f}, {rows})"
        )


def compare(name: str, ours: RowResults, theirs: RowResults, level: float = 0.95) -> Comparison:
    """Return the difference of a metric with its paired interval, over the rows that have it for both models.

    Rows of the store with the same origin are a group. Raises UserError if one model lacks the metric, if the rows or
    their tokens differ, or if no row has the metric for both models.
    """
    if ours.data != theirs.data or ours.origins != theirs.origins:
        raise UserError(
            "held-out rows: the two models were measured on different tokens; evaluate both with the same data,"
            " tokenizer and data settings"
        )
    first = ours.column(name)
    second = theirs.column(name)
    rows, at_first, at_second = np.intersect1d(
        first.rows, second.rows, assume_unique=True, return_indices=True
    )
    if not len(rows):
        raise UserError(
            f"metric {name}: no held-out row has it for both models; choose another metric"
        )
    group = np.asarray(numbered(ours.origins))[rows]
    if first.over_all:
        both = [(ours.answers[row], theirs.answers[row]) for row in rows.tolist()]
        shift = resampled(first.over_all, both, group, level)
    else:
        shift = difference(
            first.values[at_first],
            second.values[at_second],
            first.weights[at_first],
            level,
            of=_perplexities if name == PERPLEXITY else None,
            groups=group,
        )
    return Comparison(shift, len(rows), len(np.unique(group)))


def _perplexities(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(losses, HIGHEST))


def lower_is_better(metric: str) -> bool:
    return metric in (LOSS, PERPLEXITY, PAIRS_LOSS)


def numbered(keys: Sequence[object]) -> list[int]:
    """Number the distinct keys 0, 1, ... in the order of their first appearance; return the number of each key."""
    known: dict[object, int] = {}
    return [known.setdefault(key, len(known)) for key in keys]
