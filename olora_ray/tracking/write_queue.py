"""Queue of writes to one MLflow run, and the thread that sends them in order.

A series has no gap and no step twice: a (name, step) is accepted once; of a run that was there before, MLflow
is asked for the pairs it has before anything is sent; and a batch keeps its timestamps: MLflow's store sees a batch
that is sent again, because its answer was lost, as the same rows, and keeps them once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olora_ray.tracking import poisoned
from olora_ray.tracking.client import connect, is_refusal, probe, reason
from olora_ray.tracking.seen_points import SeenPoints

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

SYSTEM = "system/"
"""Prefix of this machine's metrics; they have steps of their own."""
_METRICS_PER_BATCH = 1000  # MLflow's limit (mlflow/utils/validation.py): a longer request is refused
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0
# About 75 MB, and 100,000 steps of 10 metrics; what comes beyond is not accepted, so it may be given again later.
_MOST_VALUES = 1_000_000


@dataclass(frozen=True)
class _Row:
    timestamp: int  # milliseconds
    step: int
    values: dict[str, float]

    def items_of(self, name: str | None) -> list[tuple[str, float]]:
        return [item for item in self.values.items() if name in (None, item[0])]


@dataclass(frozen=True)
class _Write:
    what: str
    write: Callable[["MlflowClient"], None]


class WriteQueue:
    """Metrics and other writes for one run. Adding never waits for the network; the thread starts with the first.

    Every write must be safe to repeat. What MLflow refuses for good, or fails at each time while it takes others, is
    dropped with a warning: tracking does not stop a training.
    """

    def __init__(self, uri: str, run_id: str, *, fresh: bool = False) -> None:
        """`fresh` promises that the run has no metrics yet."""
        self._uri = uri
        self._run_id = run_id
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[_Row | _Write] = deque()
        self._values = 0
        self._accepted = SeenPoints()
        self._loaded = fresh
        self._system_step = 0
        self._away = ""
        self._written = 0  # values since MLflow went away
        self._refused: set[str] = set()
        self._gone = False
        self._full = False
        self._flushing = 0
        self._retry = False
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def pending(self) -> int:
        """Number of metric values that wait."""
        return self._values

    @property
    def online(self) -> bool:
        """Whether MLflow has answered, and still does as far as is known."""
        return self._loaded and not self._away and not self._closed

    @property
    def away(self) -> str:
        """The reason why MLflow does not answer; empty while it does."""
        return self._away

    def rows(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Add step -> {name: value}, without the pairs that were added before or are in MLflow."""
        now = int(time.time() * 1000)
        with self._changed:
            for step, row in rows.items():
                if self._has_room():
                    self._add(now, int(step), {n: float(v) for n, v in row.items() if self._accepted.add(n, int(step))})

    def system(self, values: Mapping[str, float]) -> None:
        """Add this machine's metrics as the next step of theirs; nothing while MLflow is unreachable."""
        with self._changed:
            if self.online:
                self._add(int(time.time() * 1000), self._system_step, {SYSTEM + n: v for n, v in values.items()})
                self._system_step += 1

    def write(self, what: str, write: Callable[["MlflowClient"], None]) -> None:
        """Add another write; `what` names it in a warning."""
        with self._changed:
            if not self._closed:
                self._queue.append(_Write(what, write))
                self._wake()

    def start(self) -> None:
        """Start the thread now: it asks what MLflow has, even if nothing waits."""
        with self._changed:
            if not self._closed:
                self._wake()

    def flush(self, seconds: float) -> bool:
        """Wait until nothing waits any more, at most so long; returns whether that is so. Tries at once, and often."""
        with self._changed:
            self._flushing += 1
            self._retry = True
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._queue, seconds)
            finally:
                self._flushing -= 1

    def close(self) -> None:
        """End the thread, after the request it is in; what waits still is lost, and so is what comes later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _has_room(self) -> bool:
        if self._values < _MOST_VALUES:
            return not self._closed
        if not self._full:
            self._full = True
            logger.warning("%d metric values wait for MLflow; newer ones are not kept until it answers", self._values)
        return False

    def _add(self, timestamp: int, step: int, values: dict[str, float]) -> None:
        if values:
            self._queue.append(_Row(timestamp, step, values))
            self._values += len(values)
            self._wake()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # From here on: the thread.

    def _run(self) -> None:
        pause, failures = _FIRST_PAUSE, 0
        while self._wait_for_work():
            head = None
            try:
                probe(self._uri)
                client = connect(self._uri)
                if not self._loaded:
                    self._load(client)
                head = self._head()
                self._send(client, head, apart=failures >= poisoned.ATTEMPTS)
            except Exception as error:
                this_one = head is not None and poisoned.answers_with_an_error(error)
                failures = failures + 1 if this_one and poisoned.can_be_written(self._uri, self._run_id) else 0
                self._went_away(reason(error))
                self._pause(pause)
                pause = min(2 * pause, _LAST_PAUSE)
            else:
                self._sent(head)
                pause, failures = _FIRST_PAUSE, 0

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queue or not self._loaded)
            return not self._closed

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._retry, _FIRST_PAUSE if self._flushing else seconds)
            self._retry = False

    def _load(self, client: "MlflowClient") -> None:
        """Ask what MLflow has of this run, and drop it from what waits."""
        stored, system_step = SeenPoints(), 0
        names = _metric_names(client, self._run_id)
        if names is None:
            self._is_gone()
        for name in names or ():
            if not name.startswith(SYSTEM):
                for item in client.get_metric_history(self._run_id, name):
                    stored.add(name, item.step)
        # All names of the machine have the same steps.
        if system := [name for name in names or () if name.startswith(SYSTEM)]:
            system_step = 1 + max(item.step for item in client.get_metric_history(self._run_id, min(system)))
        with self._changed:
            self._accepted.update(stored)
            self._queue = deque(item for item in (_without(stored, item) for item in self._queue) if item is not None)
            self._values = sum(len(item.values) for item in self._queue if isinstance(item, _Row))
            self._system_step, self._loaded = system_step, True

    def _head(self) -> list[_Row] | _Write | None:
        """The next thing to send: rows of at most 1000 values together (but at least one), or another write."""
        with self._changed:
            rows: list[_Row] = []
            values = 0
            for item in self._queue:
                if isinstance(item, _Write):
                    return rows or item
                values += len(item.values)
                if rows and values > _METRICS_PER_BATCH:
                    break
                rows.append(item)
            return rows or None

    def _send(self, client: "MlflowClient", head: list[_Row] | _Write | None, apart: bool) -> None:
        """Send what is next; `apart`: it has failed time and again, so find what in it fails, and leave that out."""
        if head is None or self._gone:
            return
        try:
            if isinstance(head, _Write):
                head.write(client)
            elif apart:
                self._send_apart(head)
            else:
                self._send_rows(client, head)
        except Exception as error:
            if not is_refusal(error):
                if not apart or not isinstance(head, _Write) or not poisoned.can_be_written(self._uri, self._run_id):
                    raise
                logger.warning(
                    "MLflow fails at %s each time (%s): left out; all else is written", head.what, reason(error)
                )
            elif getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                self._is_gone()
            elif isinstance(head, _Write):
                logger.warning("MLflow refuses %s: %s", head.what, reason(error))
            else:
                self._send_by_name(client, head)

    def _send_rows(self, client: "MlflowClient", rows: Sequence[_Row], only: str | None = None) -> None:
        metrics = self._metrics(rows, only)
        for begin in range(0, len(metrics), _METRICS_PER_BATCH):
            client.log_batch(self._run_id, metrics=metrics[begin : begin + _METRICS_PER_BATCH])

    def _metrics(self, rows: Sequence[_Row], only: str | None = None) -> "list[Metric]":
        from mlflow.entities import Metric

        return [
            Metric(name, value, row.timestamp, row.step)
            for row in rows
            for name, value in row.items_of(only)
            if name not in self._refused
        ]

    def _send_apart(self, rows: Sequence[_Row]) -> None:
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

    def _send_by_name(self, client: "MlflowClient", rows: Sequence[_Row]) -> None:
        """One metric that MLflow refuses (a name it does not allow) must not take the others with it."""
        for name in dict.fromkeys(name for row in rows for name in row.values):
            try:
                self._send_rows(client, rows, only=name)
            except Exception as error:
                if not is_refusal(error):
                    raise
                self._refused.add(name)
                logger.warning("MLflow refuses the metric %s: %s", name, reason(error))

    def _is_gone(self) -> None:
        self._gone = True
        logger.warning("MLflow run %s is gone: nothing more is tracked", self._run_id)

    def _went_away(self, why: str) -> None:
        with self._changed:
            first, self._away = not self._away, why
        if first:
            logger.warning("MLflow does not answer (%s); metrics wait and training continues", why)

    def _sent(self, head: list[_Row] | _Write | None) -> None:
        values = sum(len(row.values) for row in head) if isinstance(head, list) else 0
        with self._changed:
            for _ in range(len(head) if isinstance(head, list) else head is not None):
                self._queue.popleft()
            self._values -= values
            self._written += values
            self._full = self._full and self._values >= _MOST_VALUES
            back, written = bool(self._away and not self._queue), self._written
            if not self._away or back:
                self._away, self._written = "", 0
            self._changed.notify_all()
        if back:
            logger.warning("MLflow answers again, %d values written", written)


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


def _without(stored: SeenPoints, item: _Row | _Write) -> _Row | _Write | None:
    if isinstance(item, _Write):
        return item
    left = {name: value for name, value in item.values.items() if (name, item.step) not in stored}
    return _Row(item.timestamp, item.step, left) if left else None
