"""The driver's side of the membership: start workers, have more of them join, end those that hang.

The driver starts one trainer of Ray's for the first workers and another one for those that come later. Each trainer has
a thread here; which workers train together is decided by the membership (state.py), not by the trainers.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import ControllerError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.failures import TellDriver, cause, counts
from olora_ray.cluster.membership.state import Member
from olora_ray.cluster.membership.train_backend import InPlace, LateStart, Together
from olora_ray.cluster.resources import Resources, free_abandoned
from olora_ray.cluster.spec import LEFT, TrainResult, TrainSpec
from olora_ray.cluster.worker import Entry, train_worker
from olora_ray.common import storage
from olora_ray.common.errors import TryAgain
from olora_ray.common.text import plural
from olora_ray.config.schema import Config

logger = logging.getLogger(__name__)

ENDING = 10.0
"""Seconds after the end of a training in which its trainers end; one that waits for room for a worker does not."""


@dataclass(frozen=True)
class WorkerGroup:
    """Workers that one trainer of Ray's starts."""

    workers: int
    attempt: int
    """The driver's attempt that starts them, from 1."""
    first_rank: int = 0
    """Number of the first of them, where others train already."""
    spare: bool = False
    """True if they stand by, and take nothing but memory until they are needed."""


Fit = Callable[[WorkerGroup], TrainResult]
"""Trains once with these workers, from the latest checkpoint, or has them join those that train."""


@dataclass(eq=False)
class _Started:
    """A trainer of Ray's in its thread."""

    group: WorkerGroup
    future: "Future[TrainResult]"
    seen_ended: int = 0
    """How often the driver has looked at it since its end."""


class Trainers:
    """The trainers of Ray's that supply one attempt with workers: the first, and those whose workers join it later."""

    def __init__(self, fit: Fit, channel: Any, attempt: int, workers: int) -> None:
        """Start the first, with so many workers."""
        self.fit, self.channel, self.attempt = fit, channel, attempt
        self.workers = workers
        """Workers that were started to train and have not ended, spares not counted."""
        self.failures = 0
        """Failures of workers that joined: those that count, as in `Attempts`."""
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
        """True if nobody trains any more, or the workers have given the `result`; waits 0.2 s at most."""
        first = self._first.future
        wait([first], 0.2)
        if result is None:
            self._look()
        if result or not first.done():
            return result is not None
        if _leaves_others(first):
            time.sleep(0.2)
            return all(one.future.done() for one in self._others)
        return True

    def result(self) -> TrainResult:
        """Return what the first returned; raises what it raised."""
        return self._first.future.result()

    def end(self, at_once: bool = False) -> None:
        """End all of them: none may hold what comes after the training needs. `at_once`: without asking the workers."""
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
        """Count out the trainers that have ended while others train on."""
        for one in (self._first, *self._others):
            one.seen_ended += one.future.done()
            if one.seen_ended == 2:  # else it may have been the end of the training, whose result comes before it
                self._count_out(one)

    def _count_out(self, one: _Started) -> None:
        """Wait for its workers no longer: there is room for others."""
        workers, error = one.group.workers, one.future.exception()
        if error is not None:
            self.failures += counts(error)
            why = "Ray has no room for them any more" if _no_room(error) else cause(error)
            logger.warning(f"{plural(workers, 'worker')} will not come back: {why}")
        if not one.group.spare:
            self.workers -= workers
            self.channel.want.remote(-workers)


def given(channel: Any) -> TrainResult | None:
    """Return the result that the workers have given the channel; None before their end. Raises as `answer`."""
    found: TrainResult | None = answer(channel.result.remote())
    return found


def answer(call: Any) -> Any:
    """Return a channel's answer; raises TryAgain if it has died: without it workers do not find each other."""
    try:
        return ray.get(call)
    except RayActorError as error:
        raise TryAgain(
            "the process between the driver and its workers died; the same command resumes the run"
        ) from error


def _leaves_others(first: "Future[TrainResult]") -> bool:
    """True if others may train on without the first trainer, which has ended.

    Its workers have left, or could not start again, since their node is gone.
    """
    error = first.exception()
    if error is None:
        return first.result().interrupted == LEFT
    return _no_room(error)


def _no_room(error: BaseException) -> bool:
    """True if a trainer has ended with this error because its workers could not start."""
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


def in_place(config: Config, worker: Resources) -> bool:
    """True if the workers of a training may come and go while it runs; a line says so if only this Ray cannot.

    Each must hold the whole base, and be connected over gloo: NCCL's collectives would have to be ended differently.
    """
    if config.cluster.strategy != "ddp" or "GPU" in worker:
        return False
    if problem := ray_internals.replaces_one_by_one():
        logger.warning(
            f"Ray {ray.__version__} is other than 2.60 inside ({problem}): when a worker is lost, all restart from the"
            " newest checkpoint"
        )
    return problem is None


def ray_trainer(
    spec: TrainSpec, root: str, worker: Mapping[str, float], channel: Any, group: WorkerGroup, changing: bool
) -> Any:
    """Return Ray's trainer for a group of workers, each with the resources of `worker`.

    `root` is the run's folder; `changing`: the workers may come and go (`in_place`).
    """
    from ray.train.torch import TorchTrainer

    # Ray's stubs describe Train V1; V2, which runs, has more arguments.
    ray_train: Any = ray.train
    # Groups that do not change in place are of another size at each attempt where they are elastic, so Ray must not
    # retry: every failure returns to `Attempts`, as does any of a group's whole if its room is gone.
    cluster = spec.config.cluster
    limits = {"max_failures": cluster.max_failures}
    if cluster.is_elastic():
        limits |= {"controller_failure_limit": 0}
    if cluster.is_elastic() and not changing:
        limits |= {"max_failures": 0, "max_preemption_failures": 0}
    torch_config: Any = InPlace() if changing else Together()
    checkpoints = storage.join(root, "checkpoints")
    # Not as train_loop_config, which the controller unpacks too: it would import torch for the spec.
    work: Any = partial(train_worker, spec, checkpoints, channel)
    if changing:
        entry = Entry(group.first_rank, group.attempt)
        work = LateStart(channel, ray.cloudpickle.dumps(partial(train_worker, spec, checkpoints, entry=entry)))
    # A spare takes no CPU, but Ray wants to set something aside for it.
    resources = {"CPU": 0.0, "memory": 1.0} if group.spare else dict(worker)
    made = TorchTrainer(
        work,
        torch_config=torch_config,
        scaling_config=ray_train.ScalingConfig(
            num_workers=group.workers, use_gpu="GPU" in worker, resources_per_worker=resources
        ),
        run_config=ray_train.RunConfig(
            name="checkpoints",
            storage_path=root,
            failure_config=ray_train.FailureConfig(**limits),
            callbacks=[TellDriver(channel)],
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
        ),
    )
    if ray_internals.replaces_one_by_one():
        return made
    from olora_ray.cluster.membership.places import with_own_places

    return with_own_places(made)


def end_hung(member: Member) -> None:
    """Kill the process of a member that stands still, by a task on its node; returns at once.

    Ray keeps the room of such a worker for ten minutes, and its own kill asks the worker itself.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node_id=member.node, soft=False)
    ray.remote(kill_worker).options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(member.process)


def kill_worker(process: int) -> bool:
    """Send SIGKILL to a process of this node if it is a worker of Ray Train; returns whether it was."""
    with contextlib.suppress(OSError):
        if b"RayTrainWorker" in Path(f"/proc/{process}/cmdline").read_bytes():  # as Ray writes it
            os.kill(process, signal.SIGKILL)
            return True
    return False
