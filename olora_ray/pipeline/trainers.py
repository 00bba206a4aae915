"""The trainers of Ray's that supply one attempt with workers: the first, and those whose workers join it later."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.placement_groups import free_abandoned
from olora_ray.cluster.spec import LEFT, TrainResult
from olora_ray.common.errors import TryAgain

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


class Trainers:
    """Those of one attempt, each in a thread."""

    def __init__(self, fit: Fit, channel: Any, attempt: int, workers: int) -> None:
        """Start the first, with so many workers."""
        self.fit, self.channel, self.attempt = fit, channel, attempt
        self.workers = workers
        """That were started to train, spares not counted."""
        self._named = workers
        self._first = _in_thread(partial(fit, WorkerGroup(workers, attempt)))
        self._others: list[Future[TrainResult]] = []

    def add(self, workers: int) -> None:
        """Start more workers, which join those that train when they are ready."""
        self.channel.want.remote(workers)
        self.workers += workers
        self._start(workers, spare=False)

    def stand_by(self, spares: int) -> None:
        """Start spares."""
        self._start(spares, spare=True)

    def ended(self, result: TrainResult | None) -> bool:
        """Whether nobody trains any more, or the workers have given the `result`; waits a little."""
        wait([self._first], TICK)
        if result or not self._first.done():
            return result is not None
        if self._first.exception() is None and self._first.result().interrupted == LEFT:
            time.sleep(TICK)
            return all(one.done() for one in self._others)  # its own workers have left, others train on
        return True

    def result(self) -> TrainResult:
        """What the first returned; raises what it raised."""
        return self._first.result()

    def end(self, at_once: bool = False) -> None:
        """Have all of them end: none may hold what comes after the training needs. `at_once`: Ray takes seconds."""
        every = [self._first, *self._others]
        if any(not one.done() for one in every) and not at_once:
            self.channel.request_stop.remote("training has ended")
            wait(every, ENDING)
        if any(not one.done() for one in every):
            ray_internals.end_train_controllers()
            wait(every, ENDING)
            free_abandoned()  # what they had reserved

    def _start(self, workers: int, spare: bool) -> None:
        group = WorkerGroup(workers, self.attempt, self._named, spare)
        self._named += workers
        self._others.append(_in_thread(partial(self.fit, group)))


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
