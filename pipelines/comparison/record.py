"""Record of a comparison, the content of comparison.json: tuning, trainings, losses and differences."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from comparison.statistics import Interval
from comparison.tuning import Tuned
from olora_ray.sweep.record import finite

SHARES = (0.25, 0.5, 1.0)
"""Shares of the steps after which the losses of a training are shown."""


@dataclass(frozen=True)
class Point:
    """A trial of the tuning; its loss is on the tuning rows, infinite if the training broke off."""

    arm: str
    factor: float | None
    """Multiple of the arm's rate; None for the config's own rate."""
    lr: float | None
    """Peak learning rate; None if it is automatic and no training of the arm measured it."""
    loss: float


@dataclass(frozen=True)
class Training:
    """A training of an arm at its tuned learning rate, with a new seed."""

    seed: int
    loss: float
    """Loss on the test rows after the last step; infinite if the training broke off."""
    curve: tuple[tuple[int, float], ...]
    scores: Mapping[str, float]
    """Scores of the answers of its best adapter, if the config has a scorer."""
    folder: str = ""
    mlflow_run: str = ""

    def after(self, share: float) -> float:
        """Return the loss at the evaluation that is nearest to this share of the steps."""
        last = self.curve[-1][0]
        return min(self.curve[1:] or self.curve, key=lambda point: abs(point[0] - share * last))[1]


@dataclass(frozen=True)
class Against:
    """An arm's loss minus the baseline's, in nats per supervised token."""

    mean: float
    error: float
    freedom: float
    spread: float
    """Standard deviation of the differences of single seeds."""
    interval: Interval
    """95% interval, for this comparison alone."""
    adjusted: Interval
    """Wider interval: the adjusted intervals of all comparisons hold together with 95%."""


@dataclass(frozen=True)
class ArmRecord:
    name: str
    values: Mapping[str, Any]
    tuned: Tuned | None
    """None if every trial of the grid broke off."""
    lr: float | None
    own_loss: float
    """Loss on the tuning rows at the config's own learning rate; infinite if the training broke off."""
    trainings: tuple[Training, ...]
    loss: float | None
    """Mean over seeds and test rows, per supervised token; None if a training did not finish."""
    half: float | None
    against: Against | None
    """None for the baseline, and if one of the two has no loss."""
    init_seconds: float
    tunings: int
    tuning_seconds: float
    trainable: int | None
    """Number of trained parameters, counted in an adapter; None if no training finished."""

    def broke_off(self) -> int:
        return sum(not math.isfinite(each.loss) for each in self.trainings)

    def course(self) -> tuple[float, ...]:
        """Return the loss after each of SHARES of the steps, as a mean over seeds; empty without a loss."""
        if self.loss is None:
            return ()
        return tuple(sum(each.after(share) for each in self.trainings) / len(self.trainings) for share in SHARES)

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
    tuning_seed: int
    seeds: tuple[int, ...]
    own_lr: str
    steps: int
    global_batch: int
    rows: Mapping[str, int]
    groups: int
    """Independent groups of test rows; without gate.group each row is one."""
    relevant: float
    level: float
    base_tuning: float
    base_test: float
    points: tuple[Point, ...]
    baseline: str
    arms: tuple[ArmRecord, ...]
    notes: tuple[str, ...] = ()

    def of(self, name: str) -> ArmRecord:
        return next(each for each in self.arms if each.name == name)

    def others(self) -> list[ArmRecord]:
        return [each for each in self.arms if each.name != self.baseline]

    def best(self) -> ArmRecord | None:
        """Return the arm with the lowest loss; None if no arm has one."""
        measured = [each for each in self.arms if each.loss is not None]
        return min(measured, key=lambda each: each.loss or 0.0, default=None)

    def to_json(self) -> str:
        # JSON has no infinity, so it becomes null.
        return json.dumps(finite(asdict(self)), indent=1, allow_nan=False, default=str) + "\n"
