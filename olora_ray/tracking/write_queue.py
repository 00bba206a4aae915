"""Queue of writes to one MLflow run, and the thread that sends them in order.

A series has no gap and no step twice: a (name, step) is accepted once; of a run that was there before, MLflow
is asked for the pairs it has before anything is sent; and a batch keeps its timestamps: MLflow's store sees a batch
that is sent again, because its answer was lost, as the same rows, and keeps them once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from olora_ray.tracking import poisoned
from olora_ray.tracking.client import connect, probe, reason
from olora_ray.tracking.seen_points import SeenPoints
from olora_ray.tracking.sender import METRICS_PER_BATCH, Row, Sender, Write
from olora_ray.tracking.stored_points import SYSTEM, stored_points

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0
# About 75 MB, and 100,000 steps of 10 metrics; what comes beyond is not accepted, so it may be given again later.
_MOST_VALUES = 1_000_000


class WriteQueue:
    """Metrics and other writes for one run. Adding never waits for the network; the thread starts with the first.

    Every write must be safe to repeat. What MLflow refuses for good, or fails at each time while it takes others, is
    dropped with a warning: tracking does not stop a training.
    """

    def __init__(self, uri: str, run_id: str, *, fresh: bool = False) -> None:
        """`fresh` promises that the run has no metrics yet."""
        self._uri = uri
        self._run_id = run_id
        self._sender = Sender(uri, run_id)
        self._changed = threading.Condition()  # guards all that follows
        self._queue: deque[Row | Write] = deque()
        self._values = 0
        self._accepted = SeenPoints()
        self._loaded = fresh
        self._system_step = 0
        self._away = ""
        self._written = 0  # values since MLflow went away
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
                self._queue.append(Write(what, write))
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
            self._queue.append(Row(timestamp, step, values))
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
                self._sender.send(client, head, apart=failures >= poisoned.ATTEMPTS)
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
        found = stored_points(client, self._run_id)
        if found is None:
            self._sender.note_gone()
        points, system_step = (found.points, found.system_step) if found else (SeenPoints(), 0)
        with self._changed:
            self._accepted.update(points)
            self._queue = deque(item for item in (_without(points, item) for item in self._queue) if item is not None)
            self._values = sum(len(item.values) for item in self._queue if isinstance(item, Row))
            self._system_step, self._loaded = system_step, True

    def _head(self) -> list[Row] | Write | None:
        """The next thing to send: rows of at most 1000 values together (but at least one), or another write."""
        with self._changed:
            rows: list[Row] = []
            values = 0
            for item in self._queue:
                if isinstance(item, Write):
                    return rows or item
                values += len(item.values)
                if rows and values > METRICS_PER_BATCH:
                    break
                rows.append(item)
            return rows or None

    def _went_away(self, why: str) -> None:
        with self._changed:
            first, self._away = not self._away, why
        if first:
            logger.warning("MLflow does not answer (%s); metrics wait and training continues", why)

    def _sent(self, head: list[Row] | Write | None) -> None:
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


def _without(points: SeenPoints, item: Row | Write) -> Row | Write | None:
    if isinstance(item, Write):
        return item
    left = {name: value for name, value in item.values.items() if (name, item.step) not in points}
    return Row(item.timestamp, item.step, left) if left else None
