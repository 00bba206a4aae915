"""Simulation of a training on many workers, computed from costs that were measured on few.

initialisation the most expensive share of the layers (as `assign` distributes them), then one broadcast per worker and
three gatherings of small objects exchange as in train/tree.py: two turns of one latency, in each of which W - 1
messages are started, and 2 (W - 1) / W times the bytes of the gradient, if the share of a worker is one node of the
tree checkpoint worker 0 writes it, and all wait while it copies; if writing takes longer than the interval, all wait
for it recovery failures are W times as frequent; each costs its detection, the start of all workers, which read the
base model from one storage, and half an interval of repeated steps, as on GPUs and with fsdp. With ddp on CPUs no step
is repeated, which is not simulated

The work per worker is constant: the global batch grows with the number of workers. This module measures nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
GATHERINGS = 3
"""Gatherings of small objects in an initialisation: problems, shapes, digests."""
EFFICIENT = 0.9
"""Share of the time for training below which a cause counts as the limit."""


@dataclass(frozen=True)
class Costs:
    """Costs of one worker, the network and the storage; measured or stated."""

    factors: float
    """Seconds to the factors of all layers on one worker."""
    factor_bytes: int
    gradient_bytes: int
    step: float
    """Seconds of a step without the exchange."""
    blocked: float
    """Seconds that a checkpoint stops the training."""
    written: float
    """Seconds until it is written."""
    start: float
    """Seconds to start a worker, without reading the base."""
    base_bytes: int
    bandwidth: float = 12.5e9
    """Bytes per second between two workers; 100 Gbit/s."""
    latency: float = 30e-6
    """Seconds of a message."""
    message: float = 60e-6
    """Seconds to start a message; benchmarks/tree.py measures them."""
    storage_rate: float = 5e9
    """Bytes per second of the storage, for all workers together."""
    notice: float = 30.0
    """Seconds until a failure is detected."""
    between_failures: float = 30 * DAY
    """Seconds between failures of one worker."""
    checkpoint_every: int = 50
    hours: float = 1.0
    """Length of a run's training."""


@dataclass(frozen=True)
class Times:
    """Seconds that a number of workers needs."""

    workers: int
    initialisation: float
    exchange: float
    """Seconds per step for the exchange."""
    step: float
    """Seconds per step, including the exchange."""
    checkpoint: float
    """Seconds for which a checkpoint stops the training."""
    recovery: float
    """Seconds per failure, including repeated steps."""
    lost: dict[str, float]
    """Cause -> seconds lost per second of training."""

    @property
    def efficiency(self) -> float:
        return 1 / (1 + sum(self.lost.values()))

    @property
    def limit(self) -> str:
        return max(self.lost, key=lambda cause: self.lost[cause])


def simulate(costs: Costs, workers: int, largest_share: Callable[[int], float]) -> Times:
    exchange = exchanged(costs, workers, costs.gradient_bytes)
    step = costs.step + exchange
    interval = costs.checkpoint_every * step
    checkpoint = costs.blocked + max(0.0, costs.written - interval)
    recovery = costs.notice + starting(costs, workers) + interval / 2
    rate = workers / costs.between_failures
    begun = initialisation(costs, workers, largest_share(workers))
    return Times(
        workers=workers,
        initialisation=begun,
        exchange=exchange,
        step=step,
        checkpoint=checkpoint,
        recovery=recovery,
        lost={
            "start and factors": (begun + starting(costs, workers)) / (costs.hours * HOUR),
            "exchange": exchange / costs.step,
            "checkpoints": checkpoint / (costs.checkpoint_every * costs.step),
            "recovery": _share(rate * recovery),
        },
    )


def initialisation(costs: Costs, workers: int, largest_share: float) -> float:
    if workers == 1:
        return costs.factors
    rounds = math.ceil(math.log2(workers))
    # One broadcast per worker's share, one after the other, each along a tree.
    broadcasts = rounds * (workers * costs.latency + costs.factor_bytes / costs.bandwidth)
    gatherings = GATHERINGS * 2 * (workers - 1) * costs.latency
    return costs.factors * largest_share + broadcasts + gatherings


def exchanged(costs: Costs, workers: int, size: int) -> float:
    if workers == 1:
        return 0.0
    return 2 * (costs.latency + (workers - 1) * (costs.message + size / workers / costs.bandwidth))


def starting(costs: Costs, workers: int) -> float:
    return costs.start + workers * costs.base_bytes / costs.storage_rate


def first_limit(
    costs: Costs, largest_share: Callable[[int], float], most: int = 2**20
) -> Times | None:
    """Return the times of the smallest power of two of workers with less than EFFICIENT of the time left, or None."""
    workers = 1
    while workers <= most:
        times = simulate(costs, workers, largest_share)
        if times.efficiency < EFFICIENT:
            return times
        workers *= 2
    return None


def without(costs: Costs, cause: str) -> Costs:
    gone = {
        "start and factors": {"factors": 0.0, "factor_bytes": 0, "hours": math.inf},
        "exchange": {"gradient_bytes": 0, "latency": 0.0, "message": 0.0},
        "checkpoints": {"blocked": 0.0, "written": 0.0},
        "recovery": {"between_failures": math.inf},
    }
    return replace(costs, **gone[cause])


def _share(rate: float) -> float:
    """Return seconds lost per useful second, if `rate` of all seconds are lost; at 1 nothing ever ends."""
    return rate / (1 - rate) if rate < 1 else math.inf
