"""What a number of events has cost a run: computed from when they happened and when its steps were done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.recovery import moments
from tests.recovery.moments import Done

NOTHING = "nothing that was done to it"
"""What comes before the first event."""
LONG = 2.0
"""A step that takes longer than so many typical ones has cost time; less is how steps are."""
HEADER = ["what happened", "times", "steps done again", "seconds lost", "longest pause, s"]


@dataclass(frozen=True)
class Happened:
    """An event that has begun."""

    what: str
    at: float
    """As time.time()."""


@dataclass
class Cost:
    """Of all events of a kind."""

    times: int = 0
    again: int = 0
    pauses: list[float] = field(default_factory=list)
    """Seconds of each pause, a typical step's time included."""
    lost: float = 0.0
    """Seconds by which they were longer than a step typically takes."""

    def cells(self, what: str) -> list[str]:
        longest = f"{max(self.pauses):.0f}" if self.pauses else "-"
        return [what, str(self.times), str(self.again), f"{self.lost:.0f}", longest]


def tally(happened: Sequence[Happened], done: Sequence[Done]) -> dict[str, Cost]:
    """The costs by what happened, in order of first occurrence.

    A pause goes to the first event that began within it, else to the last one before it; a step that is done again to
    the last event before it.
    """
    further, again = moments.split(done)
    typical = moments.typical(further)
    costs: dict[str, Cost] = {}
    for one in happened:
        costs.setdefault(one.what, Cost()).times += 1
    for step in again:
        costs.setdefault(_before(happened, step.at), Cost()).again += 1
    for before, after in pairwise(further):
        seconds = after.at - before.at
        if seconds > LONG * typical:
            within = [one.what for one in happened if before.at < one.at <= after.at]
            cost = costs.setdefault(within[0] if within else _before(happened, before.at), Cost())
            cost.pauses.append(seconds)
            cost.lost += seconds - typical
    return costs


def text(costs: dict[str, Cost]) -> str:
    """A table with a line for each kind, and one for all of them."""
    every = costs.values()
    total = Cost(
        sum(cost.times for cost in every),
        sum(cost.again for cost in every),
        [pause for cost in every for pause in cost.pauses],
        sum(cost.lost for cost in every),
    )
    cells = [HEADER, *(cost.cells(what) for what, cost in costs.items()), total.cells("all")]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _before(happened: Sequence[Happened], moment: float) -> str:
    found = [one.what for one in happened if one.at <= moment]
    return found[-1] if found else NOTHING
