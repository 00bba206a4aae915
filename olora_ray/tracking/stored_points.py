"""What MLflow has of a run's metrics."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from olora_ray.tracking.seen_points import SeenPoints

if TYPE_CHECKING:
    from mlflow import MlflowClient

SYSTEM = "system/"
"""Prefix of a machine's own metrics (CPU, memory, GPUs); they have steps of their own."""


@dataclass(frozen=True)
class StoredPoints:
    """What a run has."""

    points: SeenPoints
    """(name, step) of its metrics, but for those of its machine."""
    system_step: int
    """First step that no metric of its machine has."""


def stored_points(client: "MlflowClient", run_id: str) -> StoredPoints | None:
    """What MLflow has of a run, or None if the run has been deleted."""
    names = _metric_names(client, run_id)
    if names is None:
        return None
    points, system_step = SeenPoints(), 0
    for name in names:
        if not name.startswith(SYSTEM):
            for item in client.get_metric_history(run_id, name):
                points.add(name, item.step)
    # All names of the machine have the same steps.
    if system := [name for name in names if name.startswith(SYSTEM)]:
        system_step = 1 + max(item.step for item in client.get_metric_history(run_id, min(system)))
    return StoredPoints(points, system_step)


def _metric_names(client: "MlflowClient", run_id: str) -> list[str] | None:
    """The names of a run's metrics, or None if the run has been deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return list(run.data.metrics) if run.info.lifecycle_stage == "active" else None
