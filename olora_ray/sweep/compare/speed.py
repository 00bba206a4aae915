"""How soon a training comes to a loss: in steps, supervised tokens, and seconds that include its initialisation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import numpy as np


@dataclass(frozen=True)
class Course:
    """The evaluations of a training, and what it had spent at each."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: tuple[float, ...]
    """Supervised tokens trained on so far."""
    seconds: tuple[float, ...]
    """Of its steps so far; evaluations and checkpoints are not in it."""

    @classmethod
    def of(cls, history: Sequence[Mapping[str, float]]) -> "Course":
        """From the rows of a training's history, one a step."""
        rows = sorted(history, key=lambda row: row["step"])
        seconds = [row.get("train/step_seconds", 0.0) for row in rows]
        tokens = [row.get("train/tokens_per_second", 0.0) * each for row, each in zip(rows, seconds, strict=True)]
        spent = zip(rows, accumulate(tokens), accumulate(seconds), strict=True)
        found = [(row, used, took) for row, used, took in spent if "eval/loss" in row]
        return cls(
            tuple(int(row["step"]) for row, _, _ in found),
            tuple(row["eval/loss"] for row, _, _ in found),
            tuple(used for _, used, _ in found),
            tuple(took for _, _, took in found),
        )

    def points(self) -> tuple[tuple[int, float], ...]:
        """(step, loss) of each evaluation."""
        return tuple(zip(self.steps, self.losses, strict=True))


@dataclass(frozen=True)
class Reached:
    """What a training needed to come to a loss; if it never did, what it had spent at its end."""

    reached: bool
    steps: float
    tokens: float
    seconds: float

    def shown(self, value: float, unit: str = "") -> str:
        """A value of these as text; `>64` where the loss was not reached."""
        return f"{'' if self.reached else '>'}{value:,.0f}{unit}"


def reached(course: Course, target: float, initialisation: float) -> Reached:
    """When the lowest loss so far first is `target` or less, interpolated between two evaluations.

    `initialisation` are the seconds before the first step.
    """
    step = _step(course, target)
    at = course.steps[-1] if step is None else step
    tokens, seconds = (float(np.interp(at, course.steps, each)) for each in (course.tokens, course.seconds))
    return Reached(step is not None, float(at), tokens, initialisation + seconds)


def _step(course: Course, target: float) -> float | None:
    lowest = math.inf
    for place, (step, loss) in enumerate(course.points()):
        if loss <= target:
            if place == 0:
                return float(step)
            before = course.steps[place - 1]
            return before + (step - before) * (lowest - target) / (lowest - loss)
        lowest = min(lowest, loss)
    return None


@dataclass(frozen=True)
class Ratio:
    """Steps of a method / steps of the baseline, over the seeds; infinite where the loss was not reached."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, own: Sequence[Reached], baseline: Sequence[Reached]) -> "Ratio | None":
        """Seed by seed; None without seeds."""
        if not own:
            return None
        found = sorted(_ratio(mine, other) for mine, other in zip(own, baseline, strict=True))
        return cls(median(found), found[0], found[-1])

    def shown(self) -> str:
        """As `0.62 (0.50 .. 0.80)`."""
        low, middle, high = (f"{value:.2f}" if math.isfinite(value) else "never" for value in
                             (self.low, self.median, self.high))  # fmt: skip
        return f"{middle} ({low} .. {high})"


def _ratio(own: Reached, baseline: Reached) -> float:
    """Not reached in as many steps as the baseline has in all: no number is known."""
    return own.steps / max(baseline.steps, 1e-9) if own.reached else math.inf
