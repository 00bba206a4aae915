"""The learning rates that a comparison tries for each method: a grid that grows until its best point is inside.

A shared grid would decide which method wins, because the best rates of methods lie an order of magnitude apart. So each
method has its own grid, in factors of 2. If its best point lies at an end, the next point beyond that end is tried. All
functions here depend on the losses so far and on nothing else, so that an interrupted comparison resumes with the same
points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASELINE = "lora"
"""The method with which all others are compared."""
START = (0, 1, 2)
"""Powers of 2, times the centre, that are tried first."""
MOST = 7
"""Largest number of points of one grid."""
CENTRES = {"olora": 2.0e-4, "pissa": 2.0e-4, "pissa_fast": 2.0e-4, "milora": 2.0e-4}
"""Centres of the first points: methods whose product B A starts at large values want small rates."""
CENTRE = 1.6e-3
"""The centre for all other methods."""


@dataclass(frozen=True)
class Arm:
    method: str
    alpha: float
    centre: float

    def rate(self, power: int) -> float:
        # Powers of 2 are exact in floating point, so that rates can be keys of a dict.
        return self.centre * 2.0**power


@dataclass(frozen=True)
class Cell:
    """The settings of one trial of the tuning."""

    method: str
    alpha: float
    lr: float

    def changes(self) -> dict[str, object]:
        return {"adapter.method": self.method, "adapter.alpha": self.alpha, "train.lr": self.lr}


Losses = Mapping[Cell, float]
"""The loss on the tuning rows after the last step; infinite for a training that broke off."""


@dataclass(frozen=True)
class Tuned:
    cell: Cell
    """The best point."""
    loss: float
    inside: bool
    """True if the best point has worse neighbours on both sides."""
    points: int
    """Number of trials in all grids of the method."""
    diverged: int
    """Number of these that broke off, or ended above the base model."""
    width: float
    """Largest / smallest rate whose loss is within the smallest difference that matters, in the best point's grid."""


def arms(methods: Sequence[str], alpha: float, rank: int) -> list[Arm]:
    """Return the grids of a comparison; the baseline has one grid for each of alpha, r and 2 r."""
    alphas = dict.fromkeys((float(alpha), float(rank), 2.0 * rank))
    grids = []
    for method in methods:
        centre = CENTRES.get(method, CENTRE)
        grids += [Arm(method, each, centre) for each in (alphas if method == BASELINE else (float(alpha),))]
    return grids


def following(grids: Sequence[Arm], losses: Losses) -> list[Cell]:
    """Return the trials to run next; none if every grid is complete."""
    wanted = [cell(arm, power) for arm in grids for power in _next(_powers(arm, losses))]
    return wanted or _for_the_baseline(grids, losses)


def cell(arm: Arm, power: int) -> Cell:
    return Cell(arm.method, arm.alpha, arm.rate(power))


def tuned(method: str, grids: Sequence[Arm], losses: Losses, base: float, relevant: float) -> Tuned | None:
    """Return the best point of a method; None if every trial of the method broke off.

    `base` is the loss of the base model, `relevant` the smallest difference that matters.
    """
    own = {arm: _powers(arm, losses) for arm in grids if arm.method == method}
    points = [loss for of_powers in own.values() for loss in of_powers.values()]
    arm, of_powers = min(own.items(), key=lambda item: min(item[1].values(), default=math.inf))
    best = _best(of_powers)
    if best is None:
        return None
    near = [power for power, loss in of_powers.items() if loss <= of_powers[best] + relevant]
    return Tuned(
        cell(arm, best),
        of_powers[best],
        min(of_powers) < best < max(of_powers),
        len(points),
        sum(not loss <= base for loss in points),
        2.0 ** (max(near) - min(near)),
    )


def tried(grids: Sequence[Arm], losses: Losses) -> set[Cell]:
    """Return the cells that are points of a grid, without the untuned ones."""
    return {cell(arm, power) for arm in grids for power in _powers(arm, losses)}


def _powers(arm: Arm, losses: Losses) -> dict[int, float]:
    """Return power of 2 -> loss for the tried points of a grid."""
    powers = [power for power in START if cell(arm, power) in losses]
    # Points beyond a gap do not count: an untuned point may lie there by chance.
    for first, step in ((min(START) - 1, -1), (max(START) + 1, 1)):
        power = first
        while len(powers) >= len(START) and cell(arm, power) in losses:
            powers.append(power)
            power += step
    return {power: losses[cell(arm, power)] for power in sorted(powers)}


def _best(losses: Mapping[int, float]) -> int | None:
    # Among equal losses `min` returns the first, so the smallest rate.
    finite = [power for power in sorted(losses) if math.isfinite(losses[power])]
    return min(finite, key=lambda power: losses[power], default=None)


def _next(losses: Mapping[int, float]) -> list[int]:
    if missing := [power for power in START if power not in losses]:
        return missing
    if len(losses) >= MOST:
        return []
    best = _best(losses)
    # If every training broke off, only smaller rates are left to try.
    if best is None or best == min(losses):
        return [min(losses) - 1]
    return [best + 1] if best == max(losses) else []


def _for_the_baseline(grids: Sequence[Arm], losses: Losses) -> list[Cell]:
    # If another method's grid has grown longer, the baseline gets as many points: otherwise the other method could win
    # by its larger number of tries.
    count = {arm: len(_powers(arm, losses)) for arm in grids}
    own = [arm for arm in grids if arm.method == BASELINE]
    most = max((count[arm] for arm in grids if arm.method != BASELINE), default=0)
    lacking = most - sum(count[arm] for arm in own)
    wanted: list[Cell] = []
    for arm in sorted(own, key=lambda arm: min(_powers(arm, losses).values(), default=math.inf)):
        room = min(lacking - len(wanted), MOST - count[arm])
        wanted += [cell(arm, power) for power in _outside(_powers(arm, losses), room)]
    return wanted


def _outside(losses: Mapping[int, float], number: int) -> list[int]:
    best, low, high = _best(losses) or 0, min(losses, default=0), max(losses, default=0)
    # Points beyond the ends, the nearest to the best first.
    chosen: list[int] = []
    for _ in range(number):
        if high + 1 - best <= best - (low - 1):
            high += 1
            chosen.append(high)
        else:
            low -= 1
            chosen.append(low)
    return chosen
