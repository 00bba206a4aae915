"""Training of a run on the cluster; a training that an earlier attempt finished is found instead."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Failure, Message, Resumed, Saved, Started, Took, make_channel
from olora_ray.cluster.failures import cause, counts, passes, user_errors
from olora_ray.cluster.membership.driver import (
    Fit,
    Trainers,
    WorkerGroup,
    answer,
    end_hung,
    given,
    in_place,
    ray_trainer,
)
from olora_ray.cluster.resources import PlacementRequest, free_abandoned, free_workers, worker_resources
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.text import plural
from olora_ray.pipeline.connection import Stop
from olora_ray.pipeline.progress import Progress, batch_split
from olora_ray.pipeline.prometheus import Telemetry
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.prepare import CompleteStore, StoreBuild
from olora_ray.tracking.run import Tracker
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.loader import Schedule

logger = logging.getLogger(__name__)

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
                case Took():
                    self.progress.took |= message.seconds
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


# Attempts of one training: decide how many workers each gets, and whether another one follows.


SETTLE = 3.0
"""Seconds for which the room for workers must stay as it is: ended workers give theirs back one by one."""
DESERTED = 120.0
"""Seconds after the loss of the last worker, or after the last that came since, in which Ray has to bring others: their
imports alone may take 30."""
UNMET = 600.0
"""The same before the first group: a node may be lost while workers start, and their imports may come from far away."""
NOBODY = 5.0
"""Seconds without a group of workers after which the driver grants a stop itself."""
SLOW = 30.0
"""Log "waiting for workers" after this many seconds without a group."""


class Attempts:
    """One group of workers after the other, until one finishes.

    We choose the number of workers, not Ray's elastic policy: that one restarts from whatever checkpoint exists
    when it grows, counts nodes that are being drained, and waits for the reservations of a dead controller.
    """

    def __init__(
        self,
        spec: TrainSpec,
        build: StoreBuild | CompleteStore,
        monitor: Monitor,
        stop: Stop,
        worker: Mapping[str, float],
        fit: Fit,
        changing: bool = False,
        placed: bool = False,
    ) -> None:
        """`worker` has the resources of one worker.

        `changing`: workers may come and go while they train. `placed`: `fit` has a place for them, and waits for it.
        """
        self.spec, self.build, self.monitor, self.stop = spec, build, monitor, stop
        self.channel, self.progress, self.fit = monitor.channel, monitor.progress, fit
        self.worker, self.changing, self.placed = worker, changing, placed
        self.schedule = Schedule(spec.config.train, build.store)
        self.workers: int | None = None
        """Of the group that trains, or trained last."""
        self.failures = 0
        """Those that count against cluster.max_failures."""
        self.cause: str | None = None
        """Why the next group will start; None once it has."""
        self._asked = self._warned = self._running = False
        self._deserted = ""
        """Why the driver itself has ended the trainers, if it has: nobody came."""
        self._nobody_since: float | None = None
        """When the workers were first seen to form no group; None while they do."""
        self._silent = False
        """Whether it was said that they do not."""
        self._attempt = 0
        self._trainers: Trainers | None = None
        self._looked = time.monotonic()
        self._room = 0

    def run(self) -> TrainResult:
        """Train until done. Raises UserError with what went wrong in the end, and Stopped after a signal."""
        elastic, first = self.spec.config.cluster.is_elastic(), True
        while True:
            self._attempt += 1
            # What others hold until the end of a search, as processes do that several trials share, never becomes free.
            at_once = self.placed or (first and not elastic)
            workers = self.spec.config.cluster.max_workers() if at_once else self._wait_for_room()
            told = [self.channel.request_stop.remote(None), self.channel.begin_anew.remote(workers, self._attempt)]
            if not first:  # else the channel may still be starting, beside the workers
                for call in told:
                    answer(call)
            first = False
            self._trainers = Trainers(self.fit, self.channel, self._attempt, workers)
            try:
                result = self._follow(self._trainers)
            except (RayActorError, ray.train.TrainingFailedError) as error:
                self._failed(error)
                continue
            if self._is_final(result):
                return result

    def _failed(self, error: Exception) -> None:
        """Count a failure; raises UserError if it was one too many, TryAgain if it is one that passes."""
        if self._deserted and isinstance(error, RayActorError):
            self._note(self.cause or self._deserted)
            self._announce("starting others")
            return
        cluster = self.spec.config.cluster
        self.failures += counts(error)
        # A group of fixed size was restarted by Ray already, except for the loss of its controller.
        restarting = self.changing or not cluster.is_elastic()
        spent = isinstance(error, ray.train.WorkerGroupError) and restarting
        if spent or 0 <= cluster.max_failures < self.failures:
            tried = cluster.max_failures if spent else self.failures - 1
            kind = TryAgain if passes(error) else UserError
            raise kind(f"training failed after {tried} restarts: {cause(error)}") from error
        self._note(cause(error))
        if not counts(error):
            self._announce("trying again")

    def _is_final(self, result: TrainResult) -> bool:
        """False if the same training continues with another group; raises UserError and Stopped as `run`."""
        with user_errors():
            if self.build.problem is not None or self.build.store.total is not None:
                self.build.join()  # that too many rows are unusable may turn out at the last of them
        if result.problem:
            raise (TryAgain if result.passes else UserError)(result.problem)
        if not result.interrupted:
            return True
        if result.state is None:  # the first workers have left, and those that trained on were lost later
            if self.stop.asked:
                raise self.stop.stopped("stopped while no worker was left")
            self._note(self.cause or "no worker was left")
            return False
        if self.stop.asked:
            raise self.stop.stopped(f"stopped after step {result.state.step} of {self.progress.total or '?'}")
        self._note(result.interrupted)
        return False

    def _wait_for_room(self) -> int:
        """How many workers to start now: as many as fit, once the fewest do; waits for that."""
        fewest, most = self.spec.config.cluster.min_workers(), self.spec.config.cluster.max_workers()
        free, since, told = -1, time.monotonic(), False
        with PlacementRequest(self.worker, fewest, after=3 * SETTLE) as request:
            while True:
                free_abandoned()
                if (now := min(free_workers(self.worker), most)) != free:
                    free, since = now, time.monotonic()
                if free == most or (free >= fewest and time.monotonic() - since >= SETTLE):
                    return free
                if request.look() and not told:
                    told = True
                    self._announce(f"waiting for room for {fewest} workers: there is room for {free}")
                if self.stop.asked:
                    raise self.stop.stopped("stopped while waiting for the cluster")
                time.sleep(0.5)

    def _follow(self, trainers: Trainers) -> TrainResult:
        """Serve the workers until their training has ended; returns or raises what it did."""
        self._asked = self._running = self._silent = False
        self._deserted, self._nobody_since = "", None
        collected, result = time.monotonic(), None
        try:
            while not trainers.ended(result):
                self._look()
                result = given(self.channel)
                if time.monotonic() - collected >= 1.0:
                    self.monitor.collect(self._on_event)
                    self._await_workers(trainers.workers)
                    self._watch()
                    collected = time.monotonic()
            self.monitor.collect(self._on_event)
            return result or given(self.channel) or trainers.result()
        finally:
            self.monitor.telemetry.ended()
            trainers.end(at_once=self.stop.asked is not None)

    def _look(self) -> None:
        if self.stop.asked and not self._asked:
            self._ask(self.stop.asked)
            self.progress.line(f"{self.stop.asked}: stopping after this step, with a checkpoint")
        if self.build.problem is not None and not self._warned:
            self._warned = True
            self.channel.report_data_failure.remote()
            self._ask("the preparation of the training data has failed")
        if self.progress.total is None:
            self.progress.set_total(self.schedule.total())
        pause = 1.0 if self._room else 5.0
        if time.monotonic() - self._looked >= (pause if self.changing else 30.0):  # more cost the others a restart
            self._looked = time.monotonic()
            self._grow()

    def _grow(self) -> None:
        """Ask the workers to end if more of them fit: the next group resumes where they were."""
        assert self._trainers is not None
        cluster = self.spec.config.cluster
        most = cluster.max_workers()
        missing = most - (self._trainers.workers if self.changing else self.workers or most)
        if 0 <= cluster.max_failures < self._trainers.failures:
            missing = 0  # those that join fail again and again: the others train on without them
        quiet = self._running and not self._asked  # else what is free is about to be taken
        if missing and quiet:
            free_abandoned()
        room = min(missing, free_workers(self.worker)) if missing and quiet else 0
        if room and self._room:  # twice in a row: others may use what is free for a moment
            if self.changing:
                self._trainers.add(room)
            else:
                self._ask("the cluster has grown")
        self._room = room

    def _await_workers(self, workers: int) -> None:
        """Grant a stop while there is no group that could, and say what the first one waits for; raises Stopped."""
        # If workers do not change, a stop reaches a group that has begun and not failed.
        reached = self._running and not (self.changing and self.stop.asked)
        if reached or (self.changing and answer(self.channel.running.remote())):
            self._nobody_since = None
            return
        now = time.monotonic()
        self._nobody_since = self._nobody_since or now
        if self.stop.asked and now - self._nobody_since >= NOBODY:  # what is not in a checkpoint is lost already
            raise self.stop.stopped("stopped while no workers trained")
        if now - self._nobody_since >= SLOW and not self._silent and not self.placed:
            self._silent = True
            free = free_workers(self.worker)
            what = "start" if self.changing else "load the model, or to start"
            self._announce(f"waiting for {plural(workers, 'worker')} to {what}: there is room for {free} more")

    def _watch(self) -> None:
        """Help where Ray does not: with workers that hang, with none or too few, and with nodes that are taken away."""
        if not self.changing:
            return
        absent = answer(self.channel.absent.remote())
        for member in absent.hung:  # else it keeps its place for ten minutes
            end_hung(member)
        if absent.nobody_for > (DESERTED if absent.began else UNMET):  # Ray waits for room on a node that is gone
            self._deserted = "all workers were lost" if absent.began else "some workers did not come"
            ray_internals.end_train_controllers()
        if self._asked or not self._running:
            return
        if (nodes := ray_internals.draining_nodes()) and not answer(self.channel.drain_nodes.remote(nodes)):
            self._ask(f"node {', '.join(sorted(node[:8] for node in nodes))} is preempted")

    def _ask(self, why: str) -> None:
        self._asked = True
        self.channel.request_stop.remote(why)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Failure):
            self._note(event.what)
            if not self.changing:  # Ray begins them all anew, once there is room
                self._running = self._silent = False
            return
        if isinstance(event, Resumed) and event.why:  # known better than from Ray, which looks every two seconds
            self.cause = event.why
        self._started(event.step if isinstance(event, Resumed) else 0, event.workers, isinstance(event, Resumed))

    def _started(self, step: int, workers: int, resumed: bool) -> None:
        again = max(0, self.monitor.highest - step)
        first = self.workers is None and self.cause is None
        self.monitor.telemetry.started(workers, again=not first)
        if resumed or again or not first:
            what = self.cause or ("resumed" if first else "restarted")
            if self.workers not in (None, workers):
                what = f"{self.cause or 'the cluster has changed'}, {workers} instead of {self.workers} workers"
            total = self.progress.total or self.schedule.total()
            self.progress.line(
                f"{what}: training continues after step {step} of {total or '?'} with {plural(workers, 'worker')};"
                f" {plural(again, 'step')} done again{self._split(workers)}"
            )
            self.progress.back_to(step)
        elif workers != self.spec.config.cluster.max_workers():
            self.progress.line(f"training starts with {plural(workers, 'worker')}{self._split(workers)}")
        spares = self.spec.config.cluster.spares
        if spares and self.changing and self._trainers and not self._running:
            self._trainers.stand_by(spares)  # not before: they would hold up the others' start
        self.workers, self.cause, self._running = workers, None, True

    def _split(self, workers: int) -> str:
        """How the same global batch is split, if that is news."""
        config = self.spec.config
        if workers == (self.workers or config.cluster.max_workers()):
            return ""
        return f"; {batch_split(config, workers)}"

    def _note(self, what: str) -> None:
        """Remember why a group ended: of several reasons the first is the cause."""
        self.cause = what if self.changing else self.cause or what

    def _announce(self, what: str) -> None:
        """Tell what keeps the next group from starting."""
        self.progress.line(f"{self.cause}: {what}" if self.cause else what)


FitOn = Callable[[Any, WorkerGroup], TrainResult]
"""Trains once: gets the driver's channel and the workers."""


def train(
    spec: TrainSpec,
    folder: RunFolder,
    build: StoreBuild | CompleteStore,
    tracker: Tracker,
    stop: Stop,
    on_row: OnRow | None = None,
    fit_on: FitOn | None = None,
) -> TrainResult:
    """Train until done, whatever dies meanwhile; keeps training.json.

    `fit_on` trains once, on workers that it has a place for; by default TorchTrainer does, where there is room. Raises
    UserError with what went wrong in the end, and Stopped if a signal has asked for an end.
    """
    config = spec.config
    channel = make_channel(ray.get_runtime_context().get_node_id())
    worker = worker_resources(config)
    stop.gentle = True
    try:
        with Progress(Schedule(config.train, build.store).total(), config.train.log_every) as progress:
            progress.eval_every = config.train.eval_every if spec.eval else None
            progress.export = on_row is None  # else it trains for a search
            monitor = Monitor(channel, tracker, progress, Telemetry(config.run.name), on_row)
            if fit_on is None:
                progress.line("starting the workers: each imports torch and transformers")
            changing = fit_on is None and in_place(config, worker)
            fit = partial(fit_on or partial(_fit, spec, folder, worker, changing), channel)
            result = Attempts(spec, build, monitor, stop, worker, fit, changing, placed=fit_on is not None).run()
    finally:
        stop.gentle = False
    folder.write_training(result.to_json())
    if stop.asked:
        raise stop.stopped("stopped after the last step")
    return result


def finished_training(spec: TrainSpec, folder: RunFolder) -> TrainResult | None:
    """What an earlier attempt's training gave, if it had ended; what comes after it may be left to do.

    Raises UserError if the run's checkpoints are of another model, tokenizer, data or adapter.
    """
    found = checkpoints.latest_good(folder.checkpoints)
    if found is None:
        return None
    place, newest = found
    checkpoint.require_same(newest.identity, spec.identity(), place)
    text = folder.trained()
    if text is None:
        return None
    try:
        result = TrainResult.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(f"{folder.training} is damaged ({error}): the end of the training is done again")
        return None
    if result.state is None or result.state.step != newest.state.step:
        return None  # the last checkpoint is lost: train again from the one before, with the same result
    logger.info(f"training was finished before, at step {result.state.step}: continuing with what comes after it")
    return result


def _fit(
    spec: TrainSpec, folder: RunFolder, worker: Mapping[str, float], changing: bool, channel: Any, group: WorkerGroup
) -> TrainResult:
    fitted = ray_trainer(spec, folder.root, worker, channel, group, changing).fit()
    result = getattr(fitted, "return_value", None)
    if not isinstance(result, TrainResult):
        raise RuntimeError(f"training returned {result!r}")
    return result
