"""The estimate of a comparison's time: the number of its trainings, and the measured seconds of one."""

import math
import os

from comparison.arguments import ARM, BUDGET, SEEDS, Comparison
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.common.text import duration, plural
from olora_ray.config.load import override
from olora_ray.train import estimate
from olora_ray.train.estimate import MemoryEstimate
from olora_ray.train.loader import total_steps

EVALUATIONS = 4
"""Evaluations of a final training: after 25, 50, 75 and 100% of its steps."""
START_SECONDS = 15.0
"""Time of a training before its first step: processes, model, self-test."""


def measured(comparison: Comparison, spec: TrainSpec, size: MemoryEstimate) -> tuple[float, float] | str:
    """Return the seconds of (a training, an evaluation), from one micro-batch of the baseline on this machine's CPU.

    `spec` and `size` are the tuning's. Return the reason if the time would say nothing.
    """
    config = override(spec.config, comparison.baseline.values)
    elsewhere = os.environ.get("RAY_ADDRESS", "").strip() not in ("", "auto", "local")
    # The time on this machine's CPU says nothing about a GPU or about another machine of a cluster.
    if why := estimate.not_measured(config, size, elsewhere):
        return why
    assert spec.eval is not None
    train, workers = config.train, config.cluster.max_workers()
    width = min(train.micro_batch, train.global_batch)
    packs = [spec.train[number % len(spec.train)] for number in range(width)]
    once = estimate.seconds_per_micro_batch(config, spec.base, packs)
    # An evaluation has no backward pass, which takes twice the time of the forward pass.
    evaluation = -(-len(spec.eval) // (width * workers)) * once / 3
    steps = total_steps(train, len(spec.train)) * config.accumulation() * once
    return START_SECONDS + steps, evaluation


def line(
    pace: tuple[float, float] | str, tuning: int, final: int, side_by_side: int, budget: float | None = None
) -> str:
    """Return the line for the log; raise UserError if the trainings that are left need more than the budget."""
    left = f"left to do: {plural(tuning + final, 'training')}, {side_by_side} at a time"
    if isinstance(pace, str):
        return f"{left}; their time is not estimated: {pace}"
    training, evaluation = pace
    rounds = math.ceil(tuning / side_by_side), math.ceil(final / side_by_side)
    seconds = rounds[0] * (training + evaluation) + rounds[1] * (training + EVALUATIONS * evaluation)
    if budget is not None and seconds > budget:
        raise UserError(
            f"argument {BUDGET}: the comparison needs about {duration(seconds)}, and its limit is {duration(budget)};"
            f" raise it, or compare less (train.steps, {SEEDS}, {ARM}, compare.rates)"
        )
    return f"{left}: about {duration(seconds)}"
