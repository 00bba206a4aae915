"""The learning rates that a comparison tries for each method: a grid that grows until its best point is inside.

A shared grid decides who wins: methods have their best at rates that lie an order of magnitude apart. So each has its
own, by factors of 2, and where the best of it lies at an end, the next point beyond that end is tried. All here is a
function of the losses so far, so that a comparison which was interrupted goes on with what it would have tried.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BASELINE = "lora"
"""The method that all others are compared with."""
START = (0, 1, 2)
"""Powers of 2 times the centre that are tried first."""
MOST = 7
"""Points of one grid."""
CENTRES = {"olora": 2.0e-4, "pissa": 2.0e-4, "pissa_fast": 2.0e-4, "milora": 2.0e-4}
"""Where the grid of a method starts: methods whose product B A starts at large values want small rates."""
CENTRE = 1.6e-3
"""Of all other methods."""


@dataclass(frozen=True)
class Arm:
    """A grid: one method with one alpha."""

    method: str
    alpha: float
    centre: float

    def rate(self, power: int) -> float:
        """The learning rate at a power of 2; exact, so that it can be a key."""
        return self.centre * 2.0**power


@dataclass(frozen=True)
class Cell:
    """What one trial of the tuning is trained with."""

    method: str
    alpha: float
    lr: float

    def changes(self) -> dict[str, object]:
        """As dotted fields of a config."""
        return {"adapter.method": self.method, "adapter.alpha": self.alpha, "train.lr": self.lr}


Losses = Mapping[Cell, float]
"""The loss on the tuning rows after the last step; infinite for a training that broke off."""


@dataclass(frozen=True)
class Tuned:
    """What the tuning has found for a method."""

    cell: Cell
    """The best point."""
    loss: float
    inside: bool
    """Whether it has worse neighbours on both sides."""
    points: int
    """Trials of all grids of the method."""
    diverged: int
    """Those of them that broke off, or ended above the base model."""
    width: float
    """Largest / smallest rate of the best point's grid whose loss is within the smallest difference that matters."""


def arms(methods: Sequence[str], alpha: float, rank: int) -> list[Arm]:
    """The grids of a comparison; the baseline has one for each of alpha, r and 2 r."""
    alphas = dict.fromkeys((float(alpha), float(rank), 2.0 * rank))
    found = []
    for method in methods:
        centre = CENTRES.get(method, CENTRE)
        found += [Arm(method, each, centre) for each in (alphas if method == BASELINE else (float(alpha),))]
    return found


def following(grids: Sequence[Arm], losses: Losses) -> list[Cell]:
    """The trials to be run next; none if every grid is complete."""
    wanted = [cell(arm, power) for arm in grids for power in _next(_powers(arm, losses))]
    return wanted or _for_the_baseline(grids, losses)


def cell(arm: Arm, power: int) -> Cell:
    """A point of a grid."""
    return Cell(arm.method, arm.alpha, arm.rate(power))


def tuned(method: str, grids: Sequence[Arm], losses: Losses, base: float, relevant: float) -> Tuned | None:
    """The best point of a method; None if every trial of it broke off.

    `base` is the loss of the base model, `relevant` the smallest difference that matters.
    """
    own = {arm: _powers(arm, losses) for arm in grids if arm.method == method}
    points = [loss for found in own.values() for loss in found.values()]
    arm, found = min(own.items(), key=lambda item: min(item[1].values(), default=math.inf))
    best = _best(found)
    if best is None:
        return None
    near = [power for power, loss in found.items() if loss <= found[best] + relevant]
    return Tuned(
        cell(arm, best),
        found[best],
        min(found) < best < max(found),
        len(points),
        sum(not loss <= base for loss in points),
        2.0 ** (max(near) - min(near)),
    )


def tried(grids: Sequence[Arm], losses: Losses) -> set[Cell]:
    """The cells that are points of a grid; others were tried beside it."""
    return {cell(arm, power) for arm in grids for power in _powers(arm, losses)}


def _powers(arm: Arm, losses: Losses) -> dict[int, float]:
    """The points of a grid that have been tried, without a gap between them: power of 2 -> loss."""
    found = [power for power in START if cell(arm, power) in losses]
    for first, step in ((min(START) - 1, -1), (max(START) + 1, 1)):
        power = first
        while len(found) >= len(START) and cell(arm, power) in losses:
            found.append(power)
            power += step
    return {power: losses[cell(arm, power)] for power in sorted(found)}


def _best(found: Mapping[int, float]) -> int | None:
    """The power with the lowest loss, of equal ones the smallest."""
    finite = [power for power in sorted(found) if math.isfinite(found[power])]
    return min(finite, key=lambda power: found[power], default=None)


def _next(found: Mapping[int, float]) -> list[int]:
    if missing := [power for power in START if power not in found]:
        return missing
    if len(found) >= MOST:
        return []
    best = _best(found)
    if best is None or best == min(found):  # where all break off, smaller rates are what is left
        return [min(found) - 1]
    return [best + 1] if best == max(found) else []


def _for_the_baseline(grids: Sequence[Arm], losses: Losses) -> list[Cell]:
    """More points for the baseline, should another method have had more of them."""
    count = {arm: len(_powers(arm, losses)) for arm in grids}
    own = [arm for arm in grids if arm.method == BASELINE]
    most = max((count[arm] for arm in grids if arm.method != BASELINE), default=0)
    lacking = most - sum(count[arm] for arm in own)
    wanted: list[Cell] = []
    for arm in sorted(own, key=lambda arm: min(_powers(arm, losses).values(), default=math.inf)):
        room = min(lacking - len(wanted), MOST - count[arm])
        wanted += [cell(arm, power) for power in _outside(_powers(arm, losses), room)]
    return wanted


def _outside(found: Mapping[int, float], number: int) -> list[int]:
    """So many powers beyond the ends, the nearest to the best first."""
    best, low, high = _best(found) or 0, min(found, default=0), max(found, default=0)
    chosen: list[int] = []
    for _ in range(number):
        if high + 1 - best <= best - (low - 1):
            high += 1
            chosen.append(high)
        else:
            low -= 1
            chosen.append(low)
    return chosen
