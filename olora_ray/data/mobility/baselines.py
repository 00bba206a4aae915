"""Simple predictors of the next place: what a model must beat before it has learned anything worth its cost.

Each looks at the stays before the one to be predicted and at nothing else, so it can be asked about exactly the stays
that a model sees, or about all that came before. Of equally good places the one visited last is named.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from olora_ray.data.mobility.stay import MINUTES, Stay, When


@dataclass(frozen=True)
class Past:
    """The stays before one that is to be predicted, oldest first, at least one; all arrays (stays,)."""

    places: NDArray[np.int64]
    minutes: NDArray[np.int64]
    weekend: NDArray[np.bool_]

    @classmethod
    def of(cls, stays: Sequence[Stay]) -> "Past":
        """The columns of a list of stays."""
        minutes = np.array([stay.when.minute for stay in stays], dtype=np.int64)
        return cls(np.array([stay.place for stay in stays]), minutes, np.array([stay.when.weekend for stay in stays]))

    def __getitem__(self, part: slice) -> "Past":
        return Past(self.places[part], self.minutes[part], self.weekend[part])


Baseline = Callable[[Past, When], int]


def last(past: Past, when: When) -> int:
    """The place visited last."""
    return int(past.places[-1])


def most_frequent(past: Past, when: When) -> int:
    """The place visited most often."""
    return _heaviest(past.places, np.ones(len(past.places)))


def markov(past: Past, when: When) -> int:
    """The place that followed most often on the place visited last; without one, the most frequent."""
    after = past.places[1:][past.places[:-1] == past.places[-1]]
    return _heaviest(after, np.ones(len(after))) if len(after) else most_frequent(past, when)


@dataclass(frozen=True)
class TimeKernel:
    """The place with the largest sum of weights over past stays: Gaussian in the hours between the times of day."""

    hours: float = 1.0
    """Standard deviation."""
    other_days: float = 0.25
    """Factor for weekdays where the weekend is asked for, and the other way round."""
    moving: bool = False
    """Never name the place visited last, where there is another: a rule that not everybody would call simple."""

    def __call__(self, past: Past, when: When) -> int:
        """The heaviest place."""
        if self.moving and (elsewhere := past.places != past.places[-1]).any():
            past = Past(past.places[elsewhere], past.minutes[elsewhere], past.weekend[elsewhere])
        apart = np.abs(past.minutes - when.minute)
        hours = np.minimum(apart, MINUTES - apart) / 60
        exponent = -0.5 * (hours / self.hours) ** 2
        exponent += np.where(past.weekend == when.weekend, 0.0, math.log(self.other_days))
        return _heaviest(past.places, np.exp(exponent - exponent.max()))  # else all weights may be 0


BASELINES: dict[str, Baseline] = {
    "last": last,
    "most frequent": most_frequent,
    "Markov-1": markov,
    "time kernel": TimeKernel(),
}
GRID = tuple(TimeKernel(hours, other_days) for hours in (0.5, 1.0, 2.0, 4.0) for other_days in (0.05, 0.25, 1.0))
"""Time kernels of which the best on other rows is used, so that the baseline is not weak for want of a choice."""


def _heaviest(places: NDArray[np.int64], weights: NDArray[np.float64]) -> int:
    """The place with the largest sum of weights; of several the one that stands last."""
    names, place = np.unique(places, return_inverse=True)
    sums = np.bincount(place, weights)
    best = np.flatnonzero(np.isclose(sums, sums.max(), rtol=1e-9, atol=0))
    return int(names[place[np.flatnonzero(np.isin(place, best))[-1]]])
