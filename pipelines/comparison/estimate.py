"""The estimate of a comparison's time: the number of its trainings, and the measured seconds of one."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from comparison.arguments import Comparison
from comparison.grid import BASELINE, MOST, START, Cell, cell
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.common.text import duration, plural
from olora_ray.config.load import override
from olora_ray.sweep.record import TrialRecord
from olora_ray.train import estimate
from olora_ray.train.estimate import MemoryEstimate
from olora_ray.train.loader import total_steps

LIKELY = len(START) + 1
"""Points that most grids need."""
START_SECONDS = 15.0
"""Time of a training before its first step: processes, model, self-test."""
LATE = 1.2
"""A comparison that has begun may exceed its budget by this factor."""


@dataclass(frozen=True)
class Pace:
    """The time of one training, as far as it is known."""

    seconds: float | None
    """None if it is not known before the first trainings have run."""
    side_by_side: int
    """Trainings that run at the same time."""
    why_not: str = ""
    curve: float = 0.0
    """Additional seconds of a training of the final phase, which is also evaluated between its steps."""


@dataclass(frozen=True)
class Before:
    """Trainings that an interrupted attempt has finished, in the phases that are not over."""

    tuning: int = 0
    final: int = 0
    tuned: bool = False
    """True if the tuning is over, even if its grids could have more points."""


NOTHING = Before()


def measured(spec: TrainSpec, size: MemoryEstimate, side_by_side: int, eval_every: int) -> Pace:
    """Measure one micro-batch, forward and backward, on this machine's CPU, and return the pace that follows.

    `spec` is the tuning's; `eval_every` is the number of steps between two evaluations in the final phase.
    """
    config = override(spec.config, {"adapter.method": BASELINE})
    elsewhere = os.environ.get("RAY_ADDRESS", "").strip() not in ("", "auto", "local")
    # The time on this machine's CPU says nothing about a GPU or about another machine of a cluster.
    if why := estimate.not_measured(config, size, elsewhere):
        return Pace(None, side_by_side, why)
    assert spec.eval is not None
    train, workers = config.train, config.cluster.max_workers()
    width = min(train.micro_batch, train.global_batch)
    packs = [spec.train[number % len(spec.train)] for number in range(width)]
    once, _ = estimate.micro_batch(config, spec.base, packs)
    steps = total_steps(train, len(spec.train))
    # An evaluation has no backward pass, which takes twice the time of the forward pass.
    evaluation = -(-len(spec.eval) // (width * workers)) * once / 3
    seconds = START_SECONDS + steps * config.accumulation() * once + evaluation
    return Pace(seconds, side_by_side, curve=-(-steps // eval_every) * evaluation)


def of_records(records: Sequence[TrialRecord], before: Pace) -> Pace:
    """Return the pace of the trainings that have finished; `before` if there are none."""
    durations = [record.seconds for record in records if record.status == "finished"]
    return Pace(sum(durations) / len(durations), before.side_by_side, curve=before.curve) if durations else before


def trainings(comparison: Comparison, tried: Sequence[Cell], before: Before = NOTHING) -> tuple[int, int]:
    """Return the (likely, largest) number of trainings left, after `tried` and the trainings of an earlier attempt."""
    arms, left = comparison.arms(), _final(comparison, before)
    if before.final or before.tuned:
        return left, left
    extra = len([each for each in comparison.untuned() if each not in tried and not _on_a_start(comparison, each)])
    # Points of a grid that are tried already are subtracted arm by arm, because each arm has its own limit.
    done = [sum(each.method == arm.method and each.alpha == arm.alpha for each in tried) for arm in arms]
    points = [sum(max(0, each - count) for count in done) + extra - before.tuning for each in (LIKELY, MOST)]
    likely, most = (max(0, each) + left for each in points)
    return likely, most


def line(comparison: Comparison, pace: Pace, tried: Sequence[Cell], before: Before = NOTHING) -> str:
    likely, most = trainings(comparison, tried, before)
    count = plural(likely, "training") if likely == most else f"{likely} to {most} trainings"
    if pace.seconds is None:
        return f"left to do: {count}, {pace.side_by_side} at a time; their time is not estimated: {pace.why_not}"
    low, high = (duration(_seconds(number, _final(comparison, before), pace) or 0.0) for number in (likely, most))
    times = low if likely == most else f"{low}, at most {high}"
    return f"left to do: {count} of about {duration(pace.seconds)}, {pace.side_by_side} at a time: about {times}"


def check_budget(
    comparison: Comparison,
    pace: Pace,
    spent: float,
    tried: Sequence[Cell],
    before: Before = NOTHING,
    began: bool = False,
) -> None:
    """Raise UserError if the comparison will probably exceed its budget."""
    # A comparison that has begun may exceed it a little: stopping it would waste the trainings that are done.
    seconds = _seconds(trainings(comparison, tried, before)[0], _final(comparison, before), pace)
    if comparison.budget is None or seconds is None or spent + seconds <= comparison.budget * (LATE if began else 1.0):
        return
    elsewhere = " under another run.name" if began else ""
    so_far = f" after the {duration(spent)} so far" if spent else ""
    raise UserError(
        f"argument --budget: the comparison needs about {duration(seconds)} more{so_far}, and its limit is"
        f" {duration(comparison.budget)}; raise it, or compare less (train.steps, --seeds, --methods,"
        f" compare.untuned){elsewhere}"
    )


def _final(comparison: Comparison, before: Before) -> int:
    return len(comparison.methods) * len(comparison.seeds) - before.final


def _seconds(number: int, final: int, pace: Pace) -> float | None:
    if pace.seconds is None:
        return None
    # `final` of the `number` trainings are in the final phase, which takes longer by their curve.
    at_once = max(1, pace.side_by_side)
    return math.ceil(number / at_once) * pace.seconds + math.ceil(final / at_once) * pace.curve


def _on_a_start(comparison: Comparison, wanted: Cell) -> bool:
    return wanted in [cell(arm, power) for arm in comparison.arms() for power in START]
