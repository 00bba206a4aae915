"""The training of a run on the cluster, unless an earlier attempt has finished it."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError

from olora_ray.cluster.channel import Message, Saved, Started, make_channel
from olora_ray.cluster.connection import Stop
from olora_ray.cluster.failures import Failure, user_errors
from olora_ray.cluster.group import Fit, Group, ray_trainer
from olora_ray.cluster.resources import (
    PlacementRequest,
    free_abandoned,
    free_workers,
    worker_resources,
)
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.text import plural
from olora_ray.pipeline.progress import Progress, batch_split
from olora_ray.pipeline.prometheus import Telemetry
from olora_ray.pipeline.run_folder import RunFolder, RunState, by_step
from olora_ray.tokens.prepare import StoreBuild
from olora_ray.tracking.run import Tracker
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.loader import known_steps

logger = logging.getLogger(__name__)

OnRow = Callable[[int, dict[str, float]], None]
"""Receives the metrics of every step; after a restart also those of earlier steps again."""


@dataclass
class Monitor:
    channel: Any
    tracker: Tracker
    progress: Progress
    telemetry: Telemetry
    on_row: OnRow | None = None

    def __post_init__(self) -> None:
        self.highest = self.tracker.last_step("train/loss") or 0
        """The last step that a worker has reported as done."""

    def collect(self, on_start: Callable[[Started], None]) -> None:
        """Show and track new messages in order; `on_start` gets those of a group that trains."""
        messages: list[Message] = []
        # An error only delays progress: checkpoints contain the history.
        with contextlib.suppress(RayError):
            messages = ray.get(self.channel.drain.remote(), timeout=30)
        rows: dict[int, dict[str, float]] = {}
        for message in messages:
            match message:
                case str():
                    self.progress.line(message)
                case Saved():
                    self.telemetry.saved(message.seconds)
                case Started():
                    rows |= by_step(message.history)
                    on_start(message)
                case dict():
                    rows |= by_step([message])
                    self.highest = max(self.highest, int(message["step"]))
                    self.progress.row(message)
                    self.telemetry.row(message)
        self.telemetry.refresh()
        if rows:
            self.tracker.metrics(rows)
        if self.on_row:
            for step, row in sorted(rows.items()):
                self.on_row(step, row)


# Groups of workers of one training: choose the number of workers for each, and decide whether another one follows.


SETTLE = 3.0
"""Seconds without a change after which the free room counts: ended workers release their resources one by one."""
NOBODY = 5.0
"""Seconds without a group after which the driver stops without asking the workers."""
SLOW = 30.0
"""Log "waiting for workers" after this many seconds without a group."""
ROOM = 30.0
"""Seconds between two looks for room. Growing restarts all workers."""
KEEP = 600.0
"""Seconds between two writes of the resources that were used. A killed driver loses the count of this time."""


class Supervisor:
    """Starts one group of workers after the other, until one finishes the training."""

    # We choose the number of workers instead of Ray's elastic policy. To grow, that policy restarts from whatever
    # checkpoint exists, so steps are repeated. It also counts draining nodes as room, and it waits for the reservations
    # of a dead controller.

    def __init__(
        self,
        spec: TrainSpec,
        build: StoreBuild | None,
        monitor: Monitor,
        stop: Stop,
        worker: Mapping[str, float],
        fit: Fit,
        placed: bool = False,
        keep_used: Callable[[dict[str, float]], object] = lambda _: None,
    ) -> None:
        """Set up; `worker` has the resources of one worker. `placed`: `fit` reserves their resources itself.

        `keep_used` gets the resource seconds of this process's groups, now and then and at the end.
        """
        self.spec = spec
        self.cluster = spec.config.cluster
        self.build = build
        self.monitor = monitor
        self.channel = monitor.channel
        self.progress = monitor.progress
        self.stop = stop
        self.worker = worker
        self.fit = fit
        self.placed = placed
        self.keep_used = keep_used
        self.workers: int | None = None
        """Size of the group that trains or that trained last."""
        self.failures = 0
        """Failures that count against cluster.max_failures."""
        self.cause: str | None = None
        """Reason why a new group starts; None once it has started."""
        self._asked = self._running = self._silent = False
        self._hung: str | None = None
        """Why the driver has ended the group; None if it has not."""
        self._waited_since = self._looked = self._counted = self._kept = time.monotonic()
        self._room = 0
        self.used = dict.fromkeys(worker, 0.0)

    def run(self) -> TrainResult:
        """Train until done; raise UserError with the last failure, and Stopped after a signal."""
        # A trial must not wait for room: processes that trials share hold their resources until the search ends.
        at_once = self.placed or not self.cluster.is_elastic
        while True:
            workers = self.cluster.most if at_once else self._wait_for_room()
            group = Group(self.fit, workers, self.channel)
            try:
                result = self._follow(group)
            except (RayActorError, ray.train.TrainingFailedError) as error:
                if self.build and error is self.build.problem:
                    raise
                failure = Failure(error)
                self.failures += failure.counts
                reason = self._hung or failure.cause
                if 0 <= self.cluster.max_failures < self.failures:
                    error_type = TryAgain if failure.passes else UserError
                    raise error_type(
                        f"training failed after {self.failures - 1} restarts: {reason}"
                    ) from error
                # If another group fails before it trains, the first reason is the cause, and later ones are
                # consequences.
                self.cause = self.cause or reason
                self._announce("starting the workers again" if failure.counts else "retrying")
            else:
                if self._is_final(result):
                    return result
            group.begin()
            at_once = self.placed

    def _is_final(self, result: TrainResult) -> bool:
        """False if another group resumes this training; raises UserError and Stopped as `run`."""
        if self.build and (self.build.problem or self.build.store.total is not None):
            with user_errors():
                self.build.join()  # the last rows may exceed data.max_rejected
        if result.problem:
            error_type = TryAgain if result.passes else UserError
            raise error_type(result.problem)
        if not result.interrupted:
            return True
        assert result.state is not None
        if self.stop.asked:
            raise self.stop.stopped(
                f"stopped after step {result.state.step} of {self.progress.total or '?'}"
            )
        self.cause = self.cause or result.interrupted
        return False

    def _wait_for_room(self) -> int:
        """Wait until cluster.workers' minimum fits, and return how many workers fit."""
        fewest = self.cluster.fewest
        most = self.cluster.most
        free = -1
        since = time.monotonic()
        told = False
        with PlacementRequest(self.worker, fewest, after=3 * SETTLE) as request:
            while True:
                free_abandoned()
                now = min(free_workers(self.worker), most)
                if now != free:
                    free = now
                    since = time.monotonic()
                if free == most or (free >= fewest and time.monotonic() - since >= SETTLE):
                    return free
                if request.look() and not told:
                    told = True
                    self._announce(
                        f"waiting for room for {fewest} workers, but only {free} fit now"
                    )
                if self.stop.asked:
                    raise self.stop.stopped("stopped while waiting for room in the cluster")
                self.monitor.telemetry.refresh()
                time.sleep(0.5)

    def _follow(self, group: Group) -> TrainResult:
        self._asked = self._running = self._silent = False
        self._hung = None
        self._waited_since = self._counted = collected = time.monotonic()
        result = None
        try:
            while not group.ended() and result is None:
                self._look()
                result = group.answered()
                if time.monotonic() - collected >= 1.0:
                    self.monitor.collect(self._started)
                    self._await_workers(group.workers)
                    self._watch(group)
                    collected = time.monotonic()
            self.monitor.collect(self._started)
            return result or group.answered() or group.result()
        finally:
            self.keep_used(self.used)
            self.monitor.telemetry.ended()
            group.end(at_once=self.stop.asked is not None or self._hung is not None)

    def _look(self) -> None:
        if self.stop.asked and not self._asked:
            self._ask(self.stop.asked)
            self.progress.line(
                f"{self.stop.asked}: stopping after the current step or evaluation, with a checkpoint; press Ctrl+C"
                " to stop at once, which loses the steps since the last checkpoint"
            )
        if self.build and self.build.problem:
            # Workers that wait for a shard do not know that it never comes. So the driver ends the group.
            with user_errors():
                self.build.join()
        if self.progress.total is None:
            self.progress.set_total(known_steps(self.spec.config.train, self.spec.train))
        if time.monotonic() - self._looked < (1.0 if self._room else ROOM):
            return
        # End the group if more workers fit, so that a larger one resumes.
        self._looked = time.monotonic()
        missing = self.cluster.most - (self.workers or self.cluster.most)
        room = 0
        # Otherwise starting workers are about to take the free room.
        if missing and self._running and not self._asked:
            free_abandoned()
            room = min(missing, free_workers(self.worker))
        # Seen twice, because room may be free for a moment between two uses.
        if room and self._room:
            self._ask("the cluster has grown")
        self._room = room

    def _await_workers(self, workers: int) -> None:
        """Stop while no group could react to the request, and log why the first one waits; raises Stopped."""
        if self._running:
            return
        waited = time.monotonic() - self._waited_since
        if self.stop.asked and waited >= NOBODY:  # steps after the last checkpoint are lost already
            raise self.stop.stopped("stopped while no worker was training")
        if waited >= SLOW and not self._silent and not self.placed:
            self._silent = True
            free = free_workers(self.worker)
            self._announce(
                f"waiting for {plural(workers, 'worker')} to start or to load the model; {free} more would fit"
            )

    def _watch(self, group: Group) -> None:
        """Handle what Ray does not: workers that hang, and nodes that will be taken away."""
        silence = self.cluster.silence
        members, silent = group.members(silence)
        now = time.monotonic()
        for name, amount in self.worker.items():
            self.used[name] += amount * len(members) * (now - self._counted)
        self._counted = now
        if now - self._kept >= KEEP:
            self._kept = now
            self.keep_used(self.used)
        if silent:
            silent = sorted(silent, key=lambda member: member.rank)
            names = " and ".join(f"worker {member.rank}" for member in silent)
            self._hung = f"{names} gave no sign of life for {silence:g} s"
            group.end_hung(silent)
        elif self._running and not self._asked:
            leaving = group.leaving(members)
            if leaving:
                self._ask(f"node {', '.join(sorted(node[:8] for node in leaving))} is preempted")

    def _ask(self, why: str) -> None:
        self._asked = True
        self.channel.request_stop.remote(why)

    def _started(self, event: Started) -> None:
        workers = event.workers
        step = event.resumed_from or 0
        again = max(0, self.monitor.highest - step)
        first = self.workers is None and self.cause is None
        self.monitor.telemetry.started(workers, again=not first)
        if event.resumed_from is not None or again or not first:
            reason = self.cause or ("resumed" if first else "restarted")
            if self.workers not in (None, workers):
                reason = f"{self.cause or 'the cluster has changed'}, {workers} instead of {self.workers} workers"
            total = self.progress.total
            self.progress.line(
                f"{reason}: training continues after step {step} of {total or '?'} with {plural(workers, 'worker')};"
                f" {plural(again, 'step')} done again{self._split(workers)}"
            )
            self.progress.back_to(step)
        elif workers != self.cluster.most:
            self.progress.line(
                f"training starts with {plural(workers, 'worker')}{self._split(workers)}"
            )
        self.workers = workers
        self.cause = None
        self._running = True

    def _split(self, workers: int) -> str:
        if workers == (self.workers or self.cluster.most):
            return ""
        return f"; {batch_split(self.spec.config, workers)}"

    def _announce(self, text: str) -> None:
        if self.cause:
            text = f"{self.cause}: {text}"
        self.progress.line(text)


FitOn = Callable[[Any, int], TrainResult]
"""Trains once; receives the driver's channel and the number of workers."""


def train(
    spec: TrainSpec,
    folder: RunFolder,
    build: StoreBuild | None,
    tracker: Tracker,
    stop: Stop,
    on_row: OnRow | None = None,
    fit_on: FitOn | None = None,
) -> TrainResult:
    """Train until done, restart after failures, and write training.json.

    `fit_on` trains once, on workers whose resources it has reserved; the default is TorchTrainer on free resources.
    Raises UserError with the last failure, and Stopped after a signal.
    """
    config = spec.config
    channel = make_channel()
    worker = worker_resources(config)
    stop.gentle = True
    try:
        with Progress(known_steps(config.train, spec.train), config.train.log_every) as progress:
            monitor = Monitor(channel, tracker, progress, Telemetry(config.run.name), on_row)
            if fit_on is None:
                progress.line("starting the workers; each imports torch and transformers")
            before = folder.used()

            def fit(workers: int) -> TrainResult:
                if fit_on is not None:
                    return fit_on(channel, workers)
                trainer = ray_trainer(spec, folder.root, worker, channel, workers)
                result: TrainResult = trainer.fit().return_value
                return result

            def keep_used(used: dict[str, float]) -> None:
                total = {
                    name: before.get(name, 0.0) + used.get(name, 0.0) for name in before | used
                }
                # A store that does not answer must not end a training.
                with contextlib.suppress(OSError):
                    folder.keep_used(total)

            result = Supervisor(
                spec, build, monitor, stop, worker, fit, fit_on is not None, keep_used
            ).run()
    finally:
        stop.gentle = False
    folder.write_training(result)
    if stop.asked:
        raise stop.stopped("stopped after the last step")
    return result


def finished_training(spec: TrainSpec, folder: RunFolder, state: RunState) -> TrainResult | None:
    """Return the result of the training if an earlier attempt has finished it, otherwise None.

    Raises UserError if the run's checkpoints are of another model, tokenizer, data or adapter.
    """
    latest = checkpoints.latest_good(folder.checkpoints)
    if latest is None:
        return None
    path, newest = latest
    checkpoint.require_same(newest.identity, spec.identity(), path)
    result = state.trained(spec.config)
    if result is None or result.state is None or result.state.step != newest.state.step:
        return None  # the last checkpoint is lost: train again from an earlier one, with the same result
    logger.info(
        f"training is already finished, at step {result.state.step}; continuing with the export"
    )
    return result
