"""Tuned learning rate of an arm.

The best point of a grid of rates depends on luck: two arms with the same curve, each trained at its best point, would
be told apart in about 9% of comparisons, instead of 5%. So the tuned rate is the lowest point of the parabola, in log2
of the rate, through the best point and its neighbours: 6 to 7%.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
