"""Prometheus metrics of a running training; Ray's agents export them on every node as `ray_NAME`.

The driver sets them, because the workers' metrics arrive there anyway, so they cost the training loop nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

TAG = "run"
"""Label of every metric, with the name of the run."""
GAUGES = {
    "olora_supervised_tokens_per_second": (
        "train/tokens_per_second",
        "Supervised tokens per second, all workers",
    ),
    "olora_loss": ("train/loss", "Training loss of the last step"),
    "olora_eval_loss": ("eval/loss", "Loss on the held-out rows, last evaluation"),
    "olora_eval_pairs_preferred": (
        "eval/pairs/preferred",
        "Share of held-out preference pairs with a margin above 0, last evaluation",
    ),
    "olora_eval_pairs_margin": (
        "eval/pairs/margin",
        "Margin of held-out preference pairs in nats, last evaluation",
    ),
    "olora_eval_pairs_chosen": (
        "eval/pairs/chosen",
        "Change of log p of the chosen held-out answers since the first step, last evaluation",
    ),
    "olora_learning_rate": ("train/lr", "Learning rate of the last step"),
    "olora_data_wait_fraction": (
        "data/wait_fraction",
        "Share of the last step spent waiting for data, by the worker that waited longest",
    ),
    "olora_slowest_worker_seconds": (
        "train/slowest_worker_seconds",
        "Seconds of computation in a step, median of 20 steps, of the slowest worker",
    ),
    "olora_fastest_worker_seconds": (
        "train/fastest_worker_seconds",
        "Seconds of computation in a step, median of 20 steps, of the fastest worker",
    ),
    "olora_exchange_seconds": (
        "train/exchange_seconds",
        "Seconds of the exchange in a step, without the wait for slower workers",
    ),
}
"""Gauge -> (key in a row of metrics, description)."""
WORKERS = "olora_workers"
RESTARTS = "olora_restarts"
STEP_SECONDS = "olora_step_seconds"
CHECKPOINT_SECONDS = "olora_checkpoint_seconds"
BUCKETS = tuple(float(f"{digit}e{power}") for power in range(-2, 4) for digit in (1, 2, 5))
"""Upper bounds of histograms in seconds. Ray sums the middles of buckets, so read quantiles, not means."""


class Telemetry:
    """The metrics of one run; create it in the driver, after ray.init."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._metrics: dict[str, Any] = {
            name: Gauge(name, text, (TAG,)) for name, (_, text) in GAUGES.items()
        }
        self._metrics[WORKERS] = Gauge(WORKERS, "Workers that are training", (TAG,))
        self._metrics[RESTARTS] = Counter(RESTARTS, "Restarts of the workers", (TAG,))
        times = {
            STEP_SECONDS: "Seconds per step",
            CHECKPOINT_SECONDS: "Seconds to write a checkpoint",
        }
        for name, text in times.items():
            self._metrics[name] = Histogram(name, text, list(BUCKETS), (TAG,))
        for metric in self._metrics.values():
            metric.set_default_tags({TAG: run})
        self._values = {WORKERS: 0.0}
        self.refresh()

    def refresh(self) -> None:
        """Set all gauges to their last values. Call it every second: Ray drops a gauge that was not set for 20 s."""
        for name, value in self._values.items():
            self._metrics[name].set(value)

    def row(self, row: Mapping[str, float]) -> None:
        for name, (field, _) in GAUGES.items():
            if field in row and math.isfinite(row[field]):
                self._values[name] = row[field]
        if "train/step_seconds" in row:
            self._metrics[STEP_SECONDS].observe(row["train/step_seconds"])

    def started(self, workers: int, again: bool) -> None:
        self._values[WORKERS] = workers
        if again:
            self._metrics[RESTARTS].inc()

    def ended(self) -> None:
        self._values[WORKERS] = 0.0
        self.refresh()

    def saved(self, seconds: float) -> None:
        self._metrics[CHECKPOINT_SECONDS].observe(seconds)
