"""Queue of writes to one MLflow run, and the thread that sends them in order.

A series has no gap and no step twice. A (name, step) is accepted once, and of a run that was there before MLflow is
asked for the pairs it has before anything is sent. A point keeps its timestamp: MLflow stores a batch that is sent
again, because its answer was lost, as the same rows, and keeps them once. The history of a training is in its
checkpoints and is given as a whole when a training resumes and when it ends: the queue lets through what MLflow lacks.
"""

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from olora_ray.tracking.client import connect, is_answer, is_refusal, probe, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

SYSTEM = "system/"
"""Prefix of a machine's own metrics (CPU, memory, GPUs); they have steps of their own."""
METRICS_PER_BATCH = 1000
"""MLflow's limit (mlflow/utils/validation.py): a longer request is refused."""
_ATTEMPTS = 5
"""Drop a write that MLflow has failed at so often, while it takes another one."""
_TAG = "olora.can_be_written"


class Point(NamedTuple):
    """A value of a metric."""

    name: str
    value: float
    timestamp: int
    """Milliseconds."""
    step: int


class Write(NamedTuple):
    """Another write, which is safe to repeat."""

    what: str
    """Its name in a warning."""
    write: Callable[["MlflowClient"], object]


class WriteQueue:
    """Metrics and other writes for one run. Adding never waits for the network; the thread starts with the first.

    What MLflow refuses for good is dropped with a warning: tracking does not stop a training. Everything else waits
    until MLflow takes it.
    """

    def __init__(self, uri: str, run_id: str, *, fresh: bool = False) -> None:
        """`fresh` promises that the run has no metrics yet."""
        self._uri = uri
        self._run_id = run_id
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[Point | Write] = deque()
        self._accepted: defaultdict[str, set[int]] = defaultdict(set)
        self._loaded = fresh
        self._system_step = 0
        self._away = ""
        self._written_late = 0  # points since MLflow went away
        self._flushing = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        # The thread's own:
        self._refused: set[str] = set()  # names of metrics
        self._failures: Counter[Point | Write] = Counter()  # of the first item of a request

    @property
    def pending(self) -> int:
        """Number of metric values that wait."""
        with self._changed:
            return sum(isinstance(item, Point) for item in self._queue)

    @property
    def online(self) -> bool:
        """True if MLflow has answered, and has not stopped answering since."""
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
                for name, value in row.items():
                    if not self._closed and int(step) not in self._accepted[name]:
                        self._accepted[name].add(int(step))
                        self._add(Point(name, float(value), now, int(step)))

    def system(self, values: Mapping[str, float]) -> None:
        """Add this machine's metrics as the next step of theirs; nothing while MLflow is unreachable."""
        with self._changed:
            if self.online:
                now = int(time.time() * 1000)
                for name, value in values.items():
                    self._add(Point(SYSTEM + name, value, now, self._system_step))
                self._system_step += 1

    def write(self, what: str, write: Callable[["MlflowClient"], object]) -> None:
        """Add another write; `what` names it in a warning."""
        with self._changed:
            if not self._closed:
                self._add(Write(what, write))

    def start(self) -> None:
        """Start the thread now: it asks what MLflow has, even if nothing waits."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
                self._thread.start()

    def flush(self, seconds: float) -> bool:
        """Wait until nothing waits any more, at most so long; True if nothing does. MLflow is tried more often."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._queue, seconds)
            finally:
                self._flushing -= 1

    def close(self) -> None:
        """End the thread after its current request. What waits still is lost, and so is what is added later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _add(self, item: Point | Write) -> None:
        self._queue.append(item)
        self.start()
        self._changed.notify_all()

    # From here on: the thread.

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                probe(self._uri)
                client = connect(self._uri)
                if not self._loaded:
                    self._load(client)
                batch = self._next_batch()
                self._send(client, batch)
            except Exception as error:
                self._wait_for_mlflow(reason(error))
            else:
                self._note_sent(batch)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queue or not self._loaded)
            return not self._closed

    def _load(self, client: "MlflowClient") -> None:
        """Ask what MLflow has of this run, and drop that from what waits."""
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            self._note_gone()
            return
        # All metrics of the machine have the same steps: one of them tells.
        of_machine = sorted(name for name in run.data.metrics if name.startswith(SYSTEM))
        stored = {
            name: {item.step for item in client.get_metric_history(self._run_id, name)}
            for name in run.data.metrics.keys() - of_machine[1:]
        }
        with self._changed:
            for name, steps in stored.items():
                self._accepted[name] |= steps
            self._queue = deque(
                item for item in self._queue if isinstance(item, Write) or item.step not in stored.get(item.name, ())
            )
            if of_machine:
                self._system_step = 1 + max(stored[of_machine[0]])
            self._loaded = True

    def _note_gone(self) -> None:
        """Drop what waits and take nothing more: the run has been deleted."""
        logger.warning("MLflow run %s is gone: nothing more is tracked", self._run_id)
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    def _next_batch(self) -> list[Point | Write]:
        """The next items to send: points of one request, or another write."""
        with self._changed:
            batch: list[Point | Write] = []
            for item in self._queue:
                if len(batch) == METRICS_PER_BATCH or (batch and isinstance(item, Write)):
                    break
                batch.append(item)
                if isinstance(item, Write):
                    break
            return batch

    def _send(self, client: "MlflowClient", batch: Sequence[Point | Write]) -> None:
        """Send a batch; leave out, with a warning, what MLflow refuses for good. Raises what may pass."""
        from mlflow.entities import Metric

        points = [item for item in batch if isinstance(item, Point) and item.name not in self._refused]
        writes = [item for item in batch if isinstance(item, Write)]
        try:
            for item in writes:
                item.write(client)
            if points:
                client.log_batch(self._run_id, metrics=[Metric(*point) for point in points])
        except Exception as error:
            if not (is_refusal(error) or self._always_fails(client, points[0] if points else writes[0], error)):
                raise
            names = dict.fromkeys(point.name for point in points)
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                self._note_gone()
            elif len(names) > 1:  # one metric whose name MLflow does not allow must not take the others with it
                for name in names:
                    self._send(client, [point for point in points if point.name == name])
            else:
                self._refused.update(names)
                what = f"the metric {points[0].name}" if points else writes[0].what
                logger.warning("MLflow refuses %s: %s", what, reason(error))

    def _always_fails(self, client: "MlflowClient", first: Point | Write, error: Exception) -> bool:
        """True for a write that the server fails at each time, such as HTTP 500 for an emoji in a MySQL column.

        It must not block what comes after it. But a database that is read-only or full fails at all writes, and they
        have to wait: so another write is tried, and its error is raised.
        """
        self._failures[first] += is_answer(error)
        if not is_answer(error) or self._failures[first] < _ATTEMPTS:
            return False
        client.set_tag(self._run_id, _TAG, "true")
        client.delete_tag(self._run_id, _TAG)
        return True

    def _wait_for_mlflow(self, why: str) -> None:
        with self._changed:
            if not self._away:
                logger.warning("MLflow does not answer (%s); metrics wait and training continues", why)
            self._away = why
            before = self._flushing
            seconds = 1.0 if before else 10.0  # who flushes waits for it
            self._changed.wait_for(lambda: self._closed or self._flushing > before, seconds)

    def _note_sent(self, batch: Sequence[Point | Write]) -> None:
        self._failures.clear()
        with self._changed:
            for _ in range(min(len(batch), len(self._queue))):
                self._queue.popleft()
            self._written_late += sum(isinstance(item, Point) for item in batch) if self._away else 0
            if self._away and not self._queue:
                logger.warning("MLflow answers again, %d values written", self._written_late)
                self._away, self._written_late = "", 0
            self._changed.notify_all()
