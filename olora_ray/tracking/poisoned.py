"""Writes that MLflow answers with an internal error for ever: found, and left out, while all others go on.

Such an error may also mean that MLflow can write nothing now (a full disk, say). So a write is given up only while
another one, of a tag to the same run, is taken.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from olora_ray.tracking.client import connect, is_refusal, is_unavailable, reason

if TYPE_CHECKING:
    from mlflow.entities import Metric

ATTEMPTS = 5
"""Failures in a row after which a write is taken apart; with the queue's pauses about half a minute."""
_TAG = "olora.can_be_written"


def can_be_written(uri: str, run_id: str) -> bool:
    """Whether MLflow takes another write to this run now."""
    try:
        client = connect(uri)
        client.set_tag(run_id, _TAG, "true")
        client.delete_tag(run_id, _TAG)
    except Exception:
        return False
    return True


def answers_with_an_error(error: Exception) -> bool:
    """Whether somebody has answered: 500 and the like, or a database's own error."""
    return not is_unavailable(error) or "error responses" in str(error)


def send_apart(uri: str, run_id: str, metrics: Sequence["Metric"]) -> list[tuple["Metric", str]]:
    """Send values in smaller and smaller batches; returns those that fail even alone, with the reason.

    They keep their order. Raises the error of a value that fails while nothing else can be written either.
    """
    try:
        connect(uri).log_batch(run_id, metrics=list(metrics))
    except Exception as error:
        if len(metrics) > 1:
            middle = len(metrics) // 2
            return [
                *send_apart(uri, run_id, metrics[:middle]),
                *send_apart(uri, run_id, metrics[middle:]),
            ]
        if not is_refusal(error) and not (answers_with_an_error(error) and can_be_written(uri, run_id)):
            raise
        return [(metrics[0], reason(error))]
    return []
