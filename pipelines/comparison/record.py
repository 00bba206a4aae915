"""Record of a comparison, the content of comparison.json: tuning, trainings, losses, and the differences that follow.

The time until a training reaches a loss is given in steps, supervised tokens, and seconds with its initialisation.
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
    """The evaluations of a training, with the tokens and seconds spent before each."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    """Seconds of the steps so far, without evaluations and checkpoints."""

    @classmethod
    def of(cls, history: Sequence[Mapping[str, float]]) -> "Course":
        rows = sorted(history, key=lambda row: row["step"])
        seconds = [row.get("train/step_seconds", 0.0) for row in rows]
        tokens = [row.get("train/tokens_per_second", 0.0) * each for row, each in zip(rows, seconds, strict=True)]
        spent = zip(rows, accumulate(tokens), accumulate(seconds), strict=True)
        evaluated = [(row, used, took) for row, used, took in spent if "eval/loss" in row]
        return cls(
            tuple(int(row["step"]) for row, _, _ in evaluated),
            tuple(row["eval/loss"] for row, _, _ in evaluated),
            tuple(used for _, used, _ in evaluated),
            tuple(took for _, _, took in evaluated),
        )

    def points(self) -> tuple[tuple[int, float], ...]:
        return tuple(zip(self.steps, self.losses, strict=True))


@dataclass(frozen=True)
class Reached:
    """The effort until a training reached a loss; its whole effort if it never did."""

    reached: bool
    steps: float
    tokens: float
    seconds: float

    def shown(self, value: float, unit: str = "") -> str:
        """Return one of these values as text; `>64` if the loss was not reached."""
        return f"{'' if self.reached else '>'}{value:,.0f}{unit}"


def reached(course: Course, target: float, initialisation: float) -> Reached:
    """Return the effort until the lowest loss so far is at most `target`, interpolated between two evaluations.

    `initialisation` is the time in seconds before the first step.
    """
    step = _step(course, target)
    at = course.steps[-1] if step is None else step
    tokens, seconds = (float(np.interp(at, course.steps, each)) for each in (course.tokens, course.seconds))
    return Reached(step is not None, float(at), tokens, initialisation + seconds)


def _step(course: Course, target: float) -> float | None:
    lowest = math.inf
    for index, (step, loss) in enumerate(course.points()):
        if loss <= target:
            if index == 0:
                return float(step)
            # Linear between the lowest loss so far and this one: a loss in between may have risen again.
            before = course.steps[index - 1]
            return before + (step - before) * (lowest - target) / (lowest - loss)
        lowest = min(lowest, loss)
    return None


@dataclass(frozen=True)
class Ratio:
    """Steps of a method / steps of the baseline, over the seeds; infinite if the loss was not reached."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, own: Sequence[Reached], baseline: Sequence[Reached]) -> "Ratio | None":
        if not own:
            return None
        ratios = sorted(_ratio(mine, base) for mine, base in zip(own, baseline, strict=True))
        return cls(median(ratios), ratios[0], ratios[-1])

    def shown(self) -> str:
        """Return text such as `0.62 (0.50 .. 0.80)`."""
        low, middle, high = (f"{value:.2f}" if math.isfinite(value) else "never" for value in
                             (self.low, self.median, self.high))  # fmt: skip
        return f"{middle} ({low} .. {high})"


def _ratio(own: Reached, baseline: Reached) -> float:
    # Both train the same number of steps. If the method did not reach the loss in them, its true number is unknown.
    return own.steps / max(baseline.steps, 1e-9) if own.reached else math.inf


@dataclass(frozen=True)
class Point:
    """A trial of the tuning; its loss is on the tuning rows, infinite if the training broke off."""

    method: str
    alpha: float
    lr: float
    loss: float
    grid: bool = True
    """False for the untuned point, at the config's own learning rate."""


@dataclass(frozen=True)
class Training:
    """A training of a method at its tuned learning rate, with a new seed."""

    seed: int
    loss: float
    """Loss on the test rows after the last step; infinite if the training broke off."""
    curve: tuple[tuple[int, float], ...]
    """(step, loss on the test rows)."""
    reached: Reached | None
    """The effort until the baseline's last loss of the same seed; None if one of the two broke off."""
    scores: Mapping[str, float]
    """Scores of the answers of its best adapter, if the config has a scorer."""
    folder: str = ""
    mlflow_run: str = ""


@dataclass(frozen=True)
class Against:
    """A method's loss minus the baseline's, in nats per supervised token."""

    mean: float
    error: float
    """Standard error of the mean over seeds and rows."""
    freedom: float
    interval: Interval
    """95% interval, for this comparison alone."""
    adjusted: Interval
    """Wider interval: the adjusted intervals of all comparisons hold together with 95%."""
    p: float
    p_holm: float


@dataclass(frozen=True)
class MethodRecord:
    method: str
    tuned: Tuned | None
    """None if every trial of the tuning broke off."""
    trainings: tuple[Training, ...]
    loss: float | None
    """Mean over seeds and test rows, per supervised token; None if a training did not finish."""
    half: float | None
    """Half of the width of the loss's interval."""
    against: Against | None
    """None for the baseline, and if one of the two has no loss."""
    init_seconds: float
    """Time of the initialisation in one process."""
    exchanged: int
    """Bytes of the factors that workers send to each other."""
    trainable: int
    """Number of trained parameters."""

    def broke_off(self) -> int:
        return sum(not math.isfinite(each.loss) for each in self.trainings)

    def scores(self) -> dict[str, float]:
        names = dict.fromkeys(name for each in self.trainings for name in each.scores)
        return {
            name: sum(values) / len(values)
            for name in names
            if (values := [each.scores[name] for each in self.trainings if name in each.scores])
        }


@dataclass(frozen=True)
class ComparisonRecord:
    name: str
    model: str
    task: str
    machine: str
    seconds: float
    """Time of all trainings, over all attempts."""
    tuning_seed: int
    seeds: tuple[int, ...]
    rank: int
    alpha: float
    lr: float
    """The config's own learning rate, which the untuned points have."""
    steps: int
    global_batch: int
    rows: Mapping[str, int]
    """Numbers of train, tuning and test rows."""
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
        return next(each for each in self.methods if each.method == method)

    def others(self) -> list[MethodRecord]:
        return [each for each in self.methods if each.method != BASELINE]

    def untuned(self, method: str) -> Point | None:
        own = [point for point in self.points if point.method == method]
        return next((point for point in own if (point.lr, point.alpha) == (self.lr, self.alpha)), None)

    def ratio(self, method: str) -> Ratio | None:
        """Return the ratios of steps to the baseline's last loss; None if a training is missing or broke off."""
        own, base = ([each.reached for each in self.of(name).trainings] for name in (method, BASELINE))
        if not own or None in own or None in base:
            return None
        return Ratio.of([each for each in own if each], [each for each in base if each])

    def typical(self, method: str) -> Reached | None:
        """Return the effort of the training with the median number of steps to the baseline's last loss."""
        efforts = [each.reached for each in self.of(method).trainings]
        if not efforts or None in efforts:
            return None
        ordered = sorted((each for each in efforts if each), key=lambda each: (not each.reached, each.steps))
        # Of an even number this is the later of the middle two: not reached if half of them did not reach the loss.
        return ordered[len(ordered) // 2]

    def to_json(self) -> str:
        # JSON has no infinity, so it becomes null.
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
