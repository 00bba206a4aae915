"""A run in its own database, with its writes and the values that MLflow has."""

from pathlib import Path

from olora_ray.tracking import run
from olora_ray.tracking.start import start_run
from tests import tiny

Series = list[tuple[int, float]]


def local(address: str, run_id: str | None = None) -> run.Tracker:
    config = tiny.config(
        tracking__uri=address, run__storage=str(Path(address.removeprefix("sqlite:///")).parent)
    )
    return start_run(config, "local", {}, run_id)


def rows(begin: int, end: int) -> dict[int, dict[str, float]]:
    return {
        step: {"train/loss": 1 / (step + 1), "train/lr": 0.1 * step} for step in range(begin, end)
    }


def series(tracker: run.Tracker, name: str) -> Series:
    """Return a metric's values in the order of their timestamps."""
    return [
        (item.step, item.value)
        for item in tracker.client().get_metric_history(tracker.run_id, name)
    ]


def steps(tracker: run.Tracker, name: str) -> list[int]:
    return [step for step, _ in series(tracker, name)]
