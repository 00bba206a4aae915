"""What the driver does while the workers train: show and track what they tell, and pass on who wants an end."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.exceptions import RayError

from olora_ray.cluster.channel import Failure, Message, Resumed, Saved, Started
from olora_ray.cluster.resources import free_workers
from olora_ray.cluster.spec import Task
from olora_ray.config.schema import Config
from olora_ray.pipeline.progress import Progress
from olora_ray.pipeline.signals import Stop
from olora_ray.tokens.prepare import Made, Preparation
from olora_ray.tracking.prometheus import Telemetry
from olora_ray.tracking.run import Tracker
from olora_ray.train.schedule import Schedule

TICK = 0.2
"""Seconds between two looks at what has been asked for."""
COLLECT = 1.0
"""Seconds between two looks at the board."""
RESIZE = "the cluster has grown"
OnRow = Callable[[int, dict[str, float]], None]
"""Told every step's metrics, once an attempt; after a restart also those from before it."""


class Monitor:
    """The driver's side of the board, for all attempts of one training."""

    def __init__(
        self,
        task: Task,
        preparation: Preparation | Made,
        tracker: Tracker,
        progress: Progress,
        stop: Stop,
        wanted: Mapping[str, float],
        on_row: OnRow | None = None,
    ) -> None:
        """`wanted` are the resources of one worker."""
        self.on_row = on_row
        self.task, self.preparation, self.tracker = task, preparation, tracker
        self.progress, self.stop, self.wanted = progress, stop, wanted
        self.telemetry = Telemetry(task.config.run.name)
        self.schedule = Schedule(task.config.train, preparation.store)
        self.highest = tracker.last_step("train/loss") or 0
        """The last step that is known to have been done."""
        self.workers: int | None = None
        self.cause: str | None = None
        """What happened since the workers last started."""
        self._asked = self._warned = self._running = False
        self._looked = time.monotonic()
        self._room = 0

    def follow(self, training: "Future[Any]") -> Any:
        """Serve the board until the training has ended; returns or raises what it did."""
        self._asked = self._running = False
        collected = time.monotonic()
        while not wait([training], TICK).done:
            self._look()
            if time.monotonic() - collected >= COLLECT:
                self._collect()
                collected = time.monotonic()
        self._collect()
        self.telemetry.ended()
        return training.result()

    def happened(self, what: str) -> None:
        """Note why the workers will start again."""
        self.cause = self.cause or what

    def waiting(self, what: str) -> None:
        """Tell what keeps the workers from starting."""
        self.progress.line(f"{self.cause}: {what}" if self.cause else what)

    def _look(self) -> None:
        if self.stop.asked and not self._asked:
            self._ask(self.stop.asked)
            self.progress.line(f"{self.stop.asked}: stopping after this step, with a checkpoint")
        if self.preparation.problem is not None and not self._warned:
            self._warned = True
            self.task.board.give_up_waiting.remote()
            self._ask("the preparation of the training data has failed")
        if self.progress.total is None:
            self.progress.set_total(self.schedule.total())
        if time.monotonic() - self._looked >= self.task.config.cluster.resize_interval / 2:
            self._looked = time.monotonic()
            self._grow()

    def _grow(self) -> None:
        """Let the workers end if more of them fit: those that start next go on where they were."""
        missing = self.task.config.cluster.most() - (self.workers or self.task.config.cluster.most())
        quiet = self._running and not self._asked  # else what is free is about to be taken
        room = min(missing, free_workers(self.wanted)) if missing and quiet else 0
        if room and self._room:  # twice in a row: others may use what is free for a moment
            self._ask(RESIZE)
        self._room = room

    def _ask(self, why: str) -> None:
        self._asked = True
        self.task.board.stop.remote(why)

    def _collect(self) -> None:
        try:
            messages: list[Message] = ray.get(self.task.board.take.remote(), timeout=30)
        except RayError:
            return  # progress only; the history is in the checkpoint
        rows: dict[int, dict[str, float]] = {}
        for message in messages:
            match message:
                case str():
                    self.progress.line(message)
                case Failure():
                    self.happened(message.what)
                case Saved():
                    self.telemetry.saved(message.seconds)
                case Started():
                    self._started(0, message.workers, resumed=False)
                case Resumed():
                    rows |= {int(row["step"]): _without_step(row) for row in message.history}
                    self._started(message.step, message.workers, resumed=True)
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

    def _started(self, step: int, workers: int, resumed: bool) -> None:
        again = max(0, self.highest - step)
        first = self.workers is None and self.cause is None
        self.telemetry.started(workers, again=not first)
        if resumed or again or not first:
            what = self.cause or ("taken up again" if first else "restarted")
            if self.workers not in (None, workers):
                what = f"{self.cause or 'the cluster has changed'}, {workers} instead of {self.workers} workers"
            total = self.progress.total or self.schedule.total()
            self.progress.line(
                f"{what}: going on after step {step} of {total or '?'} with {_count(workers, 'worker')};"
                f" {_count(again, 'step')} done again{self._split(workers)}"
            )
            self.progress.back_to(step)
        elif workers != self.task.config.cluster.most():
            self.progress.line(f"training starts with {_count(workers, 'worker')}{self._split(workers)}")
        self.workers, self.cause, self._running = workers, None, True

    def _split(self, workers: int) -> str:
        """How the same global batch is split, if that is news."""
        config = self.task.config
        if workers == (self.workers or config.cluster.most()):
            return ""
        return f"; {batch_split(config, workers)}"


def batch_split(config: Config, workers: int) -> str:
    """`16 sequences a step = 4 workers x 2 at once x 2 accumulated`, or what comes close to it."""
    size, micro = config.train.global_batch, config.train.micro_batch
    low, high = size // workers, -(-size // workers)
    shares = f"{high}" if low == high else f"{low} or {high}"
    return (
        f"{size} sequences a step = {_count(workers, 'worker')} x {shares}"
        f" ({min(micro, high)} at once, {config.accumulation(workers)} accumulated)"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _without_step(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}
