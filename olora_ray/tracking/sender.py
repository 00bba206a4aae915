"""One thing after the other sent to one MLflow run; what MLflow does not take is left out.

What MLflow refuses for good, or fails at each time while it takes others (poisoned.py), is dropped with a warning:
tracking does not stop a training.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olora_ray.tracking import poisoned
from olora_ray.tracking.client import is_refusal, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

METRICS_PER_BATCH = 1000
"""MLflow's limit (mlflow/utils/validation.py): a longer request is refused."""


@dataclass(frozen=True)
class Row:
    """Values of one step."""

    timestamp: int
    """Milliseconds."""
    step: int
    values: dict[str, float]

    def items_of(self, name: str | None) -> list[tuple[str, float]]:
        """Names and values, or that of one name."""
        return [item for item in self.values.items() if name in (None, item[0])]


@dataclass(frozen=True)
class Write:
    """Another write, which is safe to repeat."""

    what: str
    """Its name in a warning."""
    write: Callable[["MlflowClient"], None]


class Sender:
    """Sends rows and other writes to one run, and knows what it refuses."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id
        self._refused: set[str] = set()
        self._gone = False

    def send(self, client: "MlflowClient", head: list[Row] | Write | None, apart: bool) -> None:
        """Send what is next; `apart`: it has failed time and again, so find what in it fails, and leave that out."""
        if head is None or self._gone:
            return
        try:
            if isinstance(head, Write):
                head.write(client)
            elif apart:
                self._send_apart(head)
            else:
                self._send_rows(client, head)
        except Exception as error:
            if not is_refusal(error):
                if not apart or not isinstance(head, Write) or not poisoned.can_be_written(self._uri, self._run_id):
                    raise
                logger.warning(
                    "MLflow fails at %s each time (%s): left out; all else is written", head.what, reason(error)
                )
            elif getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                self.note_gone()
            elif isinstance(head, Write):
                logger.warning("MLflow refuses %s: %s", head.what, reason(error))
            else:
                self._send_by_name(client, head)

    def _send_rows(self, client: "MlflowClient", rows: Sequence[Row], only: str | None = None) -> None:
        metrics = self._metrics(rows, only)
        for begin in range(0, len(metrics), METRICS_PER_BATCH):
            client.log_batch(self._run_id, metrics=metrics[begin : begin + METRICS_PER_BATCH])

    def _metrics(self, rows: Sequence[Row], only: str | None = None) -> "list[Metric]":
        from mlflow.entities import Metric

        return [
            Metric(name, value, row.timestamp, row.step)
            for row in rows
            for name, value in row.items_of(only)
            if name not in self._refused
        ]

    def _send_apart(self, rows: Sequence[Row]) -> None:
        left_out: dict[str, list[tuple[Metric, str]]] = {}
        for metric, why in poisoned.send_apart(self._uri, self._run_id, self._metrics(rows)):
            left_out.setdefault(metric.key, []).append((metric, why))
        for name, found in left_out.items():
            (first, why), count = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
            logger.warning(
                "MLflow fails at %s of step %d%s each time (%s): left out; all else is written",
                name,
                first.step,
                count,
                why,
            )

    def _send_by_name(self, client: "MlflowClient", rows: Sequence[Row]) -> None:
        """One metric that MLflow refuses (a name it does not allow) must not take the others with it."""
        for name in dict.fromkeys(name for row in rows for name in row.values):
            try:
                self._send_rows(client, rows, only=name)
            except Exception as error:
                if not is_refusal(error):
                    raise
                self._refused.add(name)
                logger.warning("MLflow refuses the metric %s: %s", name, reason(error))

    def note_gone(self) -> None:
        """Note that the run has been deleted: nothing is sent from now on."""
        self._gone = True
        logger.warning("MLflow run %s is gone: nothing more is tracked", self._run_id)
