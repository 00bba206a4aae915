"""The trainers of Ray's that supply one attempt with workers: the first, and those whose workers join it later."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Failure, Message, Resumed, Saved, Started
from olora_ray.cluster.failures import cause, counts
from olora_ray.cluster.resources import free_abandoned
from olora_ray.cluster.spec import LEFT, TrainResult
from olora_ray.common.errors import TryAgain
from olora_ray.common.text import plural
from olora_ray.pipeline.progress import Progress
from olora_ray.tracking.prometheus import Telemetry
from olora_ray.tracking.run import Tracker

logger = logging.getLogger(__name__)

TICK = 0.2
"""Seconds for which `ended` waits."""
ENDING = 10.0
"""Seconds after the end of a training in which its trainers end; one that waits for room for a worker does not."""


@dataclass(frozen=True)
class WorkerGroup:
    """Workers that one trainer of Ray's starts."""

    workers: int
    attempt: int
    """Which of the driver's attempts they belong to, from 1."""
    first_rank: int = 0
    """The number of the first, where others train already."""
    spare: bool = False
    """Whether they stand by, and take nothing but memory until they are needed."""


Fit = Callable[[WorkerGroup], TrainResult]
"""Trains once with these workers, from the latest checkpoint, or has them join those that train."""


@dataclass(eq=False)
class _Started:
    """A trainer that was started."""

    group: WorkerGroup
    future: "Future[TrainResult]"
    seen_ended: int = 0
    """How often it was looked at since its end."""


class Trainers:
    """Those of one attempt, each in a thread."""

    def __init__(self, fit: Fit, channel: Any, attempt: int, workers: int) -> None:
        """Start the first, with so many workers."""
        self.fit, self.channel, self.attempt = fit, channel, attempt
        self.workers = workers
        """That were started to train and have not ended, spares not counted."""
        self.failures = 0
        """Of those that joined; the ones that count, as in `Attempts`."""
        self._named = 0
        self._others: list[_Started] = []
        self._first = self._start(workers)

    def add(self, workers: int) -> None:
        """Start more workers, which join those that train when they are ready."""
        self.channel.want.remote(workers)
        self.workers += workers
        self._others.append(self._start(workers))

    def stand_by(self, spares: int) -> None:
        """Start spares."""
        self._others.append(self._start(spares, spare=True))

    def ended(self, result: TrainResult | None) -> bool:
        """Whether nobody trains any more, or the workers have given the `result`; waits a little."""
        first = self._first.future
        wait([first], TICK)
        if result is None:
            self._look()
        if result or not first.done():
            return result is not None
        if _leaves_others(first):
            time.sleep(TICK)
            return all(one.future.done() for one in self._others)
        return True

    def result(self) -> TrainResult:
        """What the first returned; raises what it raised."""
        return self._first.future.result()

    def end(self, at_once: bool = False) -> None:
        """Have all of them end: none may hold what comes after the training needs. `at_once`: Ray takes seconds."""
        every = [one.future for one in (self._first, *self._others)]
        if any(not one.done() for one in every) and not at_once:
            self.channel.request_stop.remote("training has ended")
            wait(every, ENDING)
        if any(not one.done() for one in every):
            ray_internals.end_train_controllers()
            wait(every, ENDING)
            free_abandoned()  # what they had reserved

    def _start(self, workers: int, spare: bool = False) -> _Started:
        group = WorkerGroup(workers, self.attempt, self._named, spare)
        self._named += workers
        return _Started(group, _in_thread(partial(self.fit, group)))

    def _look(self) -> None:
        """Count out the trainers that have ended while others train on; called when there was no result yet."""
        for one in (self._first, *self._others):
            one.seen_ended += one.future.done()
            if one.seen_ended == 2:  # else it may have been the end of the training, whose result comes before it
                self._count_out(one)

    def _count_out(self, one: _Started) -> None:
        """Nobody waits for its workers any more, and there is room for others."""
        workers, error = one.group.workers, one.future.exception()
        if error is not None:
            self.failures += counts(error)
            why = "Ray has no room for them any more" if _no_room(error) else cause(error)
            logger.warning(f"{plural(workers, 'worker')} will not come back: {why}")
        if not one.group.spare:
            self.workers -= workers
            self.channel.want.remote(-workers)


def given(channel: Any) -> TrainResult | None:
    """What the workers have given the driver at their end, if they do so and have ended. Raises as `answer`."""
    found: TrainResult | None = answer(channel.result.remote())
    return found


def answer(call: Any) -> Any:
    """What a channel has answered; raises TryAgain if it has died: without it workers do not find each other."""
    try:
        return ray.get(call)
    except RayActorError as error:
        raise TryAgain(
            "the process between the driver and its workers died; the same command resumes the run"
        ) from error


def _leaves_others(first: "Future[TrainResult]") -> bool:
    """Whether others may train on without the first trainer, which has ended.

    Its workers have left, or could not start again, since their node is gone.
    """
    error = first.exception()
    if error is None:
        return first.result().interrupted == LEFT
    return _no_room(error)


def _no_room(error: BaseException) -> bool:
    """Whether a trainer has ended with this error because its workers could not start."""
    return isinstance(error, ControllerError) and not counts(error)


def _in_thread(work: Callable[[], TrainResult]) -> "Future[TrainResult]":
    """Run `work` in a thread that does not keep the process alive; the main thread stays free for signals."""
    future: Future[TrainResult] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="train", daemon=True).start()
    return future


# Monitor of a training: takes what the workers report, shows it to people and tracks it.


Event = Started | Resumed | Failure
OnRow = Callable[[int, dict[str, float]], None]
"""Gets the metrics of every step, once per attempt; after a restart also those from before it."""


class Monitor:
    """Drains the channel of one training, whatever the number of its attempts."""

    def __init__(
        self, channel: Any, tracker: Tracker, progress: Progress, telemetry: Telemetry, on_row: OnRow | None = None
    ) -> None:
        self.channel, self.tracker, self.progress, self.telemetry = channel, tracker, progress, telemetry
        self.on_row = on_row
        self.highest = tracker.last_step("train/loss") or 0
        """The last step that is known to be done."""

    def collect(self, on_event: Callable[[Event], None]) -> None:
        """Show and track what has arrived; `on_event` gets what concerns the attempt, in its place among the rows."""
        try:
            messages: list[Message] = ray.get(self.channel.drain.remote(), timeout=30)
        except RayError:
            return  # progress only; the history is in the checkpoint
        rows: dict[int, dict[str, float]] = {}
        for message in messages:
            match message:
                case str():
                    self.progress.line(message)
                case Saved():
                    self.telemetry.saved(message.seconds)
                case Started() | Failure():
                    on_event(message)
                case Resumed():
                    rows |= {int(row["step"]): _without_step(row) for row in message.history}
                    on_event(message)
                case dict():
                    rows[int(message["step"])] = _without_step(message)
                    self.highest = max(self.highest, int(message["step"]))
                    self.progress.row(message)
                    self.telemetry.row(message)
        if rows:
            self.tracker.metrics(rows)
        if self.on_row:
            for step, row in sorted(rows.items()):
                self.on_row(step, row)


def _without_step(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}
