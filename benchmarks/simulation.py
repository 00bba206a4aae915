"""What a training takes on many workers: arithmetic over costs that were measured on few.

    initialisation    the costliest share of the layers (as `assign` gives them out), then a broadcast for each worker
                      and three gatherings of small objects
    exchange          as train/tree.py does it: two turns of a latency, in each of which W - 1 messages are started; 2
                      (W - 1) / W times the bytes of the gradient, where the share of a worker is one node of the tree
    checkpoint        worker 0 writes, all wait while it copies; writing that outlasts the interval is waited for
    recovery          failures come W times as often; each costs the notice, the start of all workers, who read the base
                      from one storage, and half an interval of steps done again: as on GPUs and with fsdp. With ddp on
                      CPUs the others train on at once, and no step is done again: that is not simulated

Work a worker is constant: the global batch grows with the workers. Nothing is measured here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
GATHERINGS = 3
"""Of small objects, in an initialisation: problems, shapes, digests."""
EFFICIENT = 0.9
"""Share of the time that is left for training, below which something counts as the limit."""


@dataclass(frozen=True)
class Costs:
    """Measured, or stated."""

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
    """Bytes a second between two workers; 100 Gbit/s."""
    latency: float = 30e-6
    """Seconds of a message."""
    message: float = 60e-6
    """Seconds to start a message; benchmarks/tree.py measures them."""
    storage_rate: float = 5e9
    """Bytes a second of the storage, for all workers together."""
    notice: float = 30.0
    """Seconds until a failure is noticed."""
    between_failures: float = 30 * DAY
    """Seconds between failures of one worker."""
    checkpoint_every: int = 50
    """Steps."""
    hours: float = 1.0
    """Length of a run's training."""


@dataclass(frozen=True)
class Times:
    """What a number of workers takes, in seconds."""

    workers: int
    initialisation: float
    exchange: float
    """Of a step."""
    step: float
    """With the exchange."""
    checkpoint: float
    """Of one, as the training sees it."""
    recovery: float
    """Of one failure, with the steps that are done again."""
    lost: dict[str, float]
    """By cause: seconds lost for each second of training."""

    @property
    def efficiency(self) -> float:
        """Share of the time in which steps are computed that count."""
        return 1 / (1 + sum(self.lost.values()))

    @property
    def limit(self) -> str:
        """What loses most."""
        return max(self.lost, key=lambda cause: self.lost[cause])


def simulate(costs: Costs, workers: int, largest_share: Callable[[int], float]) -> Times:
    """The times of so many workers; `largest_share` of the cost of all layers, which one worker has."""
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
    """Seconds to the same factors on all workers."""
    if workers == 1:
        return costs.factors
    rounds = math.ceil(math.log2(workers))
    # A broadcast for each worker's share, one after the other, each down a tree.
    broadcasts = rounds * (workers * costs.latency + costs.factor_bytes / costs.bandwidth)
    gatherings = GATHERINGS * 2 * (workers - 1) * costs.latency
    return costs.factors * largest_share + broadcasts + gatherings


def exchanged(costs: Costs, workers: int, size: int) -> float:
    """Seconds in which slices of `size` bytes are sent to who adds them up, and back."""
    if workers == 1:
        return 0.0
    return 2 * (costs.latency + (workers - 1) * (costs.message + size / workers / costs.bandwidth))


def starting(costs: Costs, workers: int) -> float:
    """Seconds to start all workers, whose base comes from one storage."""
    return costs.start + workers * costs.base_bytes / costs.storage_rate


def first_limit(costs: Costs, largest_share: Callable[[int], float], most: int = 2**20) -> Times | None:
    """The smallest power of two of workers at which less than EFFICIENT of the time is left; None up to `most`."""
    workers = 1
    while workers <= most:
        times = simulate(costs, workers, largest_share)
        if times.efficiency < EFFICIENT:
            return times
        workers *= 2
    return None


def without(costs: Costs, cause: str) -> Costs:
    """The costs if one cause took no time: to see what would be the limit after it."""
    gone = {
        "start and factors": {"factors": 0.0, "factor_bytes": 0, "hours": math.inf},
        "exchange": {"gradient_bytes": 0, "latency": 0.0, "message": 0.0},
        "checkpoints": {"blocked": 0.0, "written": 0.0},
        "recovery": {"between_failures": math.inf},
    }
    return replace(costs, **gone[cause])


def _share(rate: float) -> float:
    """Seconds lost for each that counts, if `rate` of all are lost; at 1 nothing ever ends."""
    return rate / (1 - rate) if rate < 1 else math.inf
