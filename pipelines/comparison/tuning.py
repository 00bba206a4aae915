"""The learning rate of an arm, from its losses at the rates of a fixed grid.

Every arm has the same grid of multiples of its automatic rate, so each has as many chances. The best point of a grid
depends on luck: if two arms had the same curve and each were trained at its best point, their difference would be
called real in about 9% of comparisons, instead of 5%. So the rate is the lowest point of the parabola, in log2 of the
rate, through the best point and its neighbours: 6 to 7% (tests/comparison/test_statistics.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

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
    width: float
    """Largest / smallest rate whose loss is within the smallest difference that matters of the best."""


def tuned(losses: Losses, base: float, relevant: float) -> Tuned | None:
    """Return the tuned rate; None if every training broke off.

    `base` is the loss of the base model, `relevant` the smallest difference that matters.
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
        _width(losses, best, relevant),
    )


def vertex(losses: Losses, best: float) -> float:
    """Return the lowest point of the parabola, in log2 of the factor, through `best` and its two neighbours."""
    factors = sorted(losses)
    here = factors.index(best)
    left, right = (math.log2(factors[other] / best) for other in (here - 1, here + 1))
    above_left, above_right = (min(losses[factors[other]], _BROKE_OFF) - losses[best] for other in (here - 1, here + 1))
    # Through (0, 0), (left, above_left) and (right, above_right): y = a x^2 + b x, lowest at -b / (2 a).
    a = (above_right / right - above_left / left) / (right - left)
    b = above_left / left - a * left
    return best * 2.0 ** (-b / (2 * a)) if a > 0 else best


def _width(losses: Losses, best: float, relevant: float) -> float:
    factors, limit = sorted(losses), losses[best] + relevant
    here = factors.index(best)
    octaves = 0.0
    for side in (factors[here::-1], factors[here:]):
        for near, far in pairwise(side):
            step = abs(math.log2(far / near))
            if losses[far] > limit:
                # Linear between two points; a training that broke off says only that the limit lies before it.
                octaves += step * (limit - losses[near]) / (losses[far] - losses[near])
                break
            octaves += step
    return float(2.0**octaves)
