"""Record of a comparison, the content of comparison.json: what was tuned, trained and measured, and what follows.

How soon a training comes to a loss is told in steps, supervised tokens, and seconds that include its initialisation.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import numpy as np

from comparison.grid import BASELINE, Tuned
from comparison.statistics import Interval


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


@dataclass(frozen=True)
class Point:
    """A trial of the tuning."""

    method: str
    alpha: float
    lr: float
    loss: float
    """On the tuning rows; infinite if the training broke off."""
    grid: bool = True
    """False: the untuned point, at the config's own learning rate."""


@dataclass(frozen=True)
class Training:
    """A training of a method at its tuned learning rate, with a fresh seed."""

    seed: int
    loss: float
    """On the test rows, after the last step; infinite if the training broke off."""
    curve: tuple[tuple[int, float], ...]
    """(step, loss on the test rows)."""
    reached: Reached | None
    """When it came to the baseline's last loss of the same seed; None if one of the two broke off."""
    scores: Mapping[str, float]
    """Of the answers of its best adapter, if the config has a scorer."""
    folder: str = ""
    mlflow_run: str = ""


@dataclass(frozen=True)
class Against:
    """A method against the baseline: loss - the baseline's, in nats per supervised token."""

    mean: float
    error: float
    """Standard error of the mean over seeds and rows."""
    freedom: float
    interval: Interval
    """Of 95%, for this comparison alone."""
    adjusted: Interval
    """Such that those of all comparisons hold together with 95%."""
    p: float
    p_holm: float


@dataclass(frozen=True)
class MethodRecord:
    """All of one method."""

    method: str
    tuned: Tuned | None
    """None: every trial of the tuning broke off."""
    trainings: tuple[Training, ...]
    loss: float | None
    """Mean over seeds and test rows, per supervised token; None unless every training has come to its end."""
    half: float | None
    """Half of its interval's width."""
    against: Against | None
    """None for the baseline, and where one of the two has no loss."""
    init_seconds: float
    """Of the initialisation, in one process."""
    exchanged: int
    """Bytes of the factors, which worker sends to worker."""
    trainable: int
    """Numbers that are trained."""

    def broke_off(self) -> int:
        """Trainings that broke off."""
        return sum(not math.isfinite(each.loss) for each in self.trainings)

    def scores(self) -> dict[str, float]:
        """Mean over the seeds of each score."""
        names = dict.fromkeys(name for each in self.trainings for name in each.scores)
        return {
            name: sum(values) / len(values)
            for name in names
            if (values := [each.scores[name] for each in self.trainings if name in each.scores])
        }


@dataclass(frozen=True)
class ComparisonRecord:
    """A whole comparison."""

    name: str
    model: str
    task: str
    """The training sources."""
    machine: str
    seconds: float
    """Of all trainings, over all attempts."""
    tuning_seed: int
    seeds: tuple[int, ...]
    rank: int
    alpha: float
    lr: float
    """The config's own, of the untuned points."""
    steps: int
    global_batch: int
    rows: Mapping[str, int]
    """Number of train, tuning and test rows."""
    groups: int
    """Independent groups of test rows; without gate.group each row is one."""
    relevant: float
    level: float
    base_tuning: float
    """Loss of the base model on the tuning rows."""
    base_test: float
    points: tuple[Point, ...]
    methods: tuple[MethodRecord, ...]
    """In the order of the command line."""
    notes: tuple[str, ...] = ()

    def of(self, method: str) -> MethodRecord:
        """The record of a method."""
        return next(each for each in self.methods if each.method == method)

    def others(self) -> list[MethodRecord]:
        """All but the baseline."""
        return [each for each in self.methods if each.method != BASELINE]

    def untuned(self, method: str) -> Point | None:
        """The point at the config's own learning rate and alpha."""
        own = [point for point in self.points if point.method == method]
        return next((point for point in own if (point.lr, point.alpha) == (self.lr, self.alpha)), None)

    def ratio(self, method: str) -> Ratio | None:
        """Steps to the baseline's last loss / those of the baseline; None if a training broke off, or was not run."""
        own, base = ([each.reached for each in self.of(name).trainings] for name in (method, BASELINE))
        if not own or None in own or None in base:  # none: every trial of its tuning broke off
            return None
        return Ratio.of([each for each in own if each], [each for each in base if each])

    def typical(self, method: str) -> Reached | None:
        """When a training of a method comes to the baseline's last loss: that with the median number of steps.

        Of an even number the later of the middle two: not reached if half of them did not reach it.
        """
        found = [each.reached for each in self.of(method).trainings]
        if not found or None in found:
            return None
        ordered = sorted((each for each in found if each), key=lambda each: (not each.reached, each.steps))
        return ordered[len(ordered) // 2]

    def to_json(self) -> str:
        """The text of comparison.json; infinity becomes null, as JSON has none."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
