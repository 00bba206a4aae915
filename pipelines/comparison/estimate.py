"""How long a comparison will take: the number of its trainings, and the seconds of one, measured."""

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
"""Points of a grid, as most need."""
START_SECONDS = 15.0
"""Of a training before its first step: processes, model, self-test."""
LATE = 1.2
"""A comparison that is under way may exceed its budget by this factor before it is ended."""


@dataclass(frozen=True)
class Pace:
    """What is known of the time of one training."""

    seconds: float | None
    """None: not known before the first have run."""
    side_by_side: int
    """Trainings at the same time."""
    why_not: str = ""
    curve: float = 0.0
    """Seconds that a training of the final phase takes more: it is evaluated on its way, one of the tuning is not."""


@dataclass(frozen=True)
class Before:
    """Trainings that an attempt which was interrupted has ended, of the phases that are not over."""

    tuning: int = 0
    final: int = 0
    tuned: bool = False
    """Whether the tuning is over, however many points its grids could have had."""


NOTHING = Before()


def measured(spec: TrainSpec, size: MemoryEstimate, side_by_side: int, eval_every: int) -> Pace:
    """From one micro-batch forward and backward, on this machine's CPU.

    `spec` is of the tuning; `eval_every` are the steps from one evaluation to the next in the final phase.
    """
    config = override(spec.config, {"adapter.method": BASELINE})
    elsewhere = os.environ.get("RAY_ADDRESS", "").strip() not in ("", "auto", "local")
    if why := estimate.not_measured(config, size, elsewhere):
        return Pace(None, side_by_side, why)
    assert spec.eval is not None
    train, workers = config.train, config.cluster.max_workers()
    width = min(train.micro_batch, train.global_batch)
    packs = [spec.train[number % len(spec.train)] for number in range(width)]
    once = estimate.seconds_per_micro_batch(config, spec.base, packs)
    steps = total_steps(train, len(spec.train))
    # Forward only, which is a third of forward and backward.
    evaluation = -(-len(spec.eval) // (width * workers)) * once / 3
    seconds = START_SECONDS + steps * config.accumulation() * once + evaluation
    return Pace(seconds, side_by_side, curve=-(-steps // eval_every) * evaluation)


def of_records(records: Sequence[TrialRecord], before: Pace) -> Pace:
    """From trainings that have run to their end."""
    whole = [record.seconds for record in records if record.status == "finished"]
    return Pace(sum(whole) / len(whole), before.side_by_side, curve=before.curve) if whole else before


def trainings(comparison: Comparison, tried: Sequence[Cell], before: Before = NOTHING) -> tuple[int, int]:
    """(likely, at most) trainings that are left, after these of the tuning and what an earlier attempt has done."""
    arms, left = comparison.arms(), _final(comparison, before)
    if before.final or before.tuned:
        return left, left
    extra = len([each for each in comparison.untuned() if each not in tried and not _on_a_start(comparison, each)])
    done = [sum(each.method == arm.method and each.alpha == arm.alpha for each in tried) for arm in arms]
    points = [sum(max(0, each - count) for count in done) + extra - before.tuning for each in (LIKELY, MOST)]
    likely, most = (max(0, each) + left for each in points)
    return likely, most


def line(comparison: Comparison, found: Pace, tried: Sequence[Cell], before: Before = NOTHING) -> str:
    """What is left to do, for the log."""
    likely, most = trainings(comparison, tried, before)
    count = plural(likely, "training") if likely == most else f"{likely} to {most} trainings"
    if found.seconds is None:
        return f"left to do: {count}, {found.side_by_side} at a time; their time is not estimated: {found.why_not}"
    low, high = (duration(_seconds(number, _final(comparison, before), found) or 0.0) for number in (likely, most))
    times = low if likely == most else f"{low}, at most {high}"
    return f"left to do: {count} of about {duration(found.seconds)}, {found.side_by_side} at a time: about {times}"


def check_budget(
    comparison: Comparison,
    found: Pace,
    spent: float,
    tried: Sequence[Cell],
    before: Before = NOTHING,
    began: bool = False,
) -> None:
    """Raise UserError if the comparison likely takes longer than its budget; one that has begun may a little."""
    seconds = _seconds(trainings(comparison, tried, before)[0], _final(comparison, before), found)
    if comparison.budget is None or seconds is None or spent + seconds <= comparison.budget * (LATE if began else 1.0):
        return
    elsewhere = " under another run.name" if began else ""
    so_far = f" after the {duration(spent)} so far" if spent else ""
    raise UserError(
        f"argument --budget: the comparison takes about {duration(seconds)} more{so_far}, and may take"
        f" {duration(comparison.budget)} in all; raise it, or compare less (train.steps, --seeds, --methods,"
        f" compare.untuned){elsewhere}"
    )


def _final(comparison: Comparison, before: Before) -> int:
    """Trainings of the final phase that are left."""
    return len(comparison.methods) * len(comparison.seeds) - before.final


def _seconds(number: int, final: int, found: Pace) -> float | None:
    """Of so many trainings, `final` of them of the final phase."""
    if found.seconds is None:
        return None
    at_once = max(1, found.side_by_side)
    return math.ceil(number / at_once) * found.seconds + math.ceil(final / at_once) * found.curve


def _on_a_start(comparison: Comparison, wanted: Cell) -> bool:
    return wanted in [cell(arm, power) for arm in comparison.arms() for power in START]
