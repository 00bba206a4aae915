"""Queue of writes to one MLflow run, and the thread that sends them in order.

A metric series has no gap and no step twice. The queue accepts a pair (name, step) once; for an existing run it first
asks MLflow for the pairs that it has. A point keeps its timestamp: if a batch is sent again because its answer was
lost, MLflow stores the same rows and keeps them once. The complete history of a training is in its checkpoints. It is
given again when a training resumes and when it ends, and the queue lets through only the points that MLflow lacks.
"""

import itertools
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from olora_ray.tracking.client import connect, existing, is_answer, is_refusal, probe, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# Prefix of a machine's own metrics (CPU, memory, GPUs), which MLflow's monitor writes.
SYSTEM = "system/"
# MLflow's limit (mlflow/utils/validation.py): it refuses a longer request.
METRICS_PER_BATCH = 1000
# A write is dropped after this many failures, if MLflow accepts another write meanwhile.
_ATTEMPTS = 5
_TAG = "olora.can_be_written"


class Point(NamedTuple):
    name: str
    value: float
    timestamp: int
    """Milliseconds."""
    step: int


class Write(NamedTuple):
    """A write other than a metric; it must be safe to repeat."""

    what: str
    """Its name in a warning."""
    write: Callable[["MlflowClient"], object]


class WriteQueue:
    """Metrics and other writes for one run. Adding never waits for the network; the thread starts with the first write.

    A write that MLflow refuses for good is dropped with a warning, because tracking must not stop a training.
    Everything else waits until MLflow accepts it.
    """

    def __init__(self, uri: str, run_id: str, *, fresh: bool = False) -> None:
        self._uri = uri
        self._run_id = run_id
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[Point | Write] = deque()
        self._accepted: defaultdict[str, set[int]] = defaultdict(set)
        self._loaded = fresh  # True: the metrics that MLflow has are known; a fresh run has none
        self._away = ""
        self._written_late = 0  # points written since an outage began
        self._flushing = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        # The thread's own:
        self._refused: set[str] = set()  # names of metrics
        self._failures: Counter[Point | Write] = Counter()  # of the first item of a request

    @property
    def pending(self) -> int:
        with self._changed:
            return sum(isinstance(item, Point) for item in self._queue)

    @property
    def away(self) -> str:
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

    def write(self, what: str, write: Callable[["MlflowClient"], object]) -> None:
        with self._changed:
            if not self._closed:
                self._add(Write(what, write))

    def flush(self, seconds: float) -> bool:
        """Wait at most `seconds` until everything is written, with shorter pauses; return True if it is."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._queue, seconds)
            finally:
                self._flushing -= 1

    def close(self) -> None:
        """End the thread after its current request. Waiting and later writes are lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _add(self, item: Point | Write) -> None:
        self._queue.append(item)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # The methods below run in the thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
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

    def _load(self, client: "MlflowClient") -> None:
        run = existing(client.get_run, self._run_id)
        if run is None or run.info.lifecycle_stage != "active":
            self._note_gone()
            return
        stored: defaultdict[str, set[int]] = defaultdict(set)
        for name in run.data.metrics:
            if not name.startswith(SYSTEM):
                history = client.get_metric_history(self._run_id, name)
                stored[name] = {item.step for item in history}
        with self._changed:
            for name, steps in stored.items():
                self._accepted[name] |= steps
            waiting = self._queue
            self._queue = deque()
            for item in waiting:
                if isinstance(item, Write) or item.step not in stored[item.name]:
                    self._queue.append(item)
            self._loaded = True

    def _note_gone(self) -> None:
        logger.warning(
            "MLflow run %s no longer exists: nothing more is logged to MLflow", self._run_id
        )
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    def _next_batch(self) -> list[Point | Write]:
        with self._changed:
            if self._queue and isinstance(self._queue[0], Write):
                return [self._queue[0]]
            points = itertools.takewhile(lambda item: isinstance(item, Point), self._queue)
            return list(itertools.islice(points, METRICS_PER_BATCH))

    def _send(self, client: "MlflowClient", batch: Sequence[Point | Write]) -> None:
        """Send a batch; drop what MLflow refuses for good, with a warning. Raise errors that may pass."""
        from mlflow.entities import Metric

        points = [
            item for item in batch if isinstance(item, Point) and item.name not in self._refused
        ]
        writes = [item for item in batch if isinstance(item, Write)]
        try:
            for item in writes:
                item.write(client)
            if points:
                client.log_batch(self._run_id, metrics=[Metric(*point) for point in points])
        except Exception as error:
            first = points[0] if points else writes[0]
            if not is_refusal(error) and not self._always_fails(client, first, error):
                raise
            names = dict.fromkeys(point.name for point in points)
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                self._note_gone()
            elif len(names) > 1:  # one forbidden metric name must not block the other metrics
                for name in names:
                    self._send(client, [point for point in points if point.name == name])
            else:
                self._refused.update(names)
                what = first.what if isinstance(first, Write) else f"the metric {first.name}"
                logger.warning("MLflow refuses %s: %s", what, reason(error))

    def _always_fails(self, client: "MlflowClient", first: Point | Write, error: Exception) -> bool:
        """True for a write on which the server always fails, such as HTTP 500 for an emoji in MySQL."""
        # Such a write must not block later ones. But a read-only or full database fails on all writes, and they must
        # wait. So another write is tried, and its error is raised.
        self._failures[first] += is_answer(error)
        if not is_answer(error) or self._failures[first] < _ATTEMPTS:
            return False
        client.set_tag(self._run_id, _TAG, "true")
        client.delete_tag(self._run_id, _TAG)
        return True

    def _wait_for_mlflow(self, why: str) -> None:
        with self._changed:
            if not self._away:
                logger.warning(
                    "MLflow does not answer (%s); metrics wait and training continues", why
                )
            self._away = why
            before = self._flushing
            seconds = 1.0 if before else 10.0  # shorter, because a caller of flush waits
            self._changed.wait_for(lambda: self._closed or self._flushing > before, seconds)

    def _note_sent(self, batch: Sequence[Point | Write]) -> None:
        self._failures.clear()
        with self._changed:
            for _ in range(min(len(batch), len(self._queue))):
                self._queue.popleft()
            if self._away:
                self._written_late += sum(isinstance(item, Point) for item in batch)
                if not self._queue:
                    logger.warning("MLflow answers again, %d values written", self._written_late)
                    self._away = ""
                    self._written_late = 0
            self._changed.notify_all()
