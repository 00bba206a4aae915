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

from olora_ray.tracking.client import connect, is_refusal, is_unavailable, probe, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

# Writes that MLflow answers with an internal error for ever: found, and left out, while all others go on.


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


# Which steps of which metrics have been seen, in little memory.


_BLOCK = 1024


class SeenPoints:
    """A set of (name, step): one bit per pair, in blocks of 1024 steps."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, int], int] = {}

    def add(self, name: str, step: int) -> bool:
        """Add a pair; False if it is there already."""
        block, bit = (name, step // _BLOCK), 1 << (step % _BLOCK)
        there = self._blocks.get(block, 0)
        self._blocks[block] = there | bit
        return not there & bit

    def __contains__(self, pair: tuple[str, int]) -> bool:
        name, step = pair
        return bool(self._blocks.get((name, step // _BLOCK), 0) >> (step % _BLOCK) & 1)

    def update(self, other: "SeenPoints") -> None:
        """Add all pairs of `other`."""
        for block, bits in other._blocks.items():
            self._blocks[block] = self._blocks.get(block, 0) | bits


# One thing after the other sent to one MLflow run; what MLflow does not take is left out.


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
                if not apart or not isinstance(head, Write) or not can_be_written(self._uri, self._run_id):
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
        for metric, why in send_apart(self._uri, self._run_id, self._metrics(rows)):
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


# What MLflow has of a run's metrics.


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
                self._sender.send(client, head, apart=failures >= ATTEMPTS)
            except Exception as error:
                this_one = head is not None and answers_with_an_error(error)
                failures = failures + 1 if this_one and can_be_written(self._uri, self._run_id) else 0
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
