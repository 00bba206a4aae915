"""The driver's side of a membership: start workers, start more of them later, and kill those that hang.

The driver starts a trainer of Ray Train for the first workers, and another trainer for each set of workers that joins
later. Each trainer has a thread here. Which workers train together is decided by the membership (state.py), not by the
trainers.
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
"""Seconds in which trainers end by themselves after a training. A trainer that waits for room for a worker does not."""


@dataclass(frozen=True)
class WorkerGroup:
    """Workers that one trainer of Ray Train starts."""

    workers: int
    attempt: int
    """The driver's attempt that starts them, counted from 1."""
    first_rank: int = 0
    """Number of the first of these workers, so that later trainers do not reuse a number."""
    spare: bool = False
    """True if the workers are spares, which take only memory until they are needed."""


Fit = Callable[[WorkerGroup], TrainResult]
"""Function that trains with these workers from the newest checkpoint, or lets them join the current group."""


@dataclass(eq=False)
class _Started:
    group: WorkerGroup
    future: "Future[TrainResult]"
    seen_ended: int = 0
    """Number of times that the driver has looked at the trainer since its end."""


class Trainers:
    """The trainers of Ray Train in one attempt: the first trainer, and later ones whose workers join its workers.

    The constructor starts the first trainer with `workers` workers.
    """

    def __init__(self, fit: Fit, channel: Any, attempt: int, workers: int) -> None:
        self.fit, self.channel, self.attempt = fit, channel, attempt
        self.workers = workers
        """Workers that were started to train and have not ended. Spares are not counted."""
        self.failures = 0
        """Failures of workers that joined, as far as they count against cluster.max_failures."""
        self._named = 0
        self._others: list[_Started] = []
        self._first = self._start(workers)

    def add(self, workers: int) -> None:
        """Start more workers. They join the group when they are ready."""
        self.channel.want.remote(workers)
        self.workers += workers
        self._others.append(self._start(workers))

    def stand_by(self, spares: int) -> None:
        self._others.append(self._start(spares, spare=True))

    def ended(self, result: TrainResult | None) -> bool:
        """True if no trainer trains any more, or if the workers have sent `result`. Waits up to 0.2 s."""
        first = self._first.future
        wait([first], 0.2)
        if result is None:
            self._count_ended()
        if result or not first.done():
            return result is not None
        if _leaves_others(first):
            time.sleep(0.2)
            return all(trainer.future.done() for trainer in self._others)
        return True

    def result(self) -> TrainResult:
        return self._first.future.result()

    def end(self, at_once: bool = False) -> None:
        """End all trainers, so that they free their CPUs and memory. `at_once`: kill them without asking first."""
        futures = [trainer.future for trainer in (self._first, *self._others)]
        if any(not future.done() for future in futures) and not at_once:
            self.channel.request_stop.remote("training has ended")
            wait(futures, ENDING)
        if any(not future.done() for future in futures):
            ray_internals.end_train_controllers()
            wait(futures, ENDING)
            free_abandoned()  # killed controllers leave their placement groups behind

    def _start(self, workers: int, spare: bool = False) -> _Started:
        group = WorkerGroup(workers, self.attempt, self._named, spare)
        self._named += workers
        return _Started(group, _in_thread(partial(self.fit, group)))

    def _count_ended(self) -> None:
        for trainer in (self._first, *self._others):
            trainer.seen_ended += trainer.future.done()
            # At the end of a training the workers send the result before their trainer ends. The driver reads it
            # between two looks, so a trainer that is still here at the second look has ended without a result.
            if trainer.seen_ended == 2:
                self._count_out(trainer)

    def _count_out(self, trainer: _Started) -> None:
        # Do not expect these workers any more, so that the driver may start others in their room.
        workers, error = trainer.group.workers, trainer.future.exception()
        if error is not None:
            self.failures += counts(error)
            why = "Ray has no room for them any more" if _no_room(error) else cause(error)
            logger.warning(f"{plural(workers, 'worker')} will not come back: {why}")
        if not trainer.group.spare:
            self.workers -= workers
            self.channel.want.remote(-workers)


def given(channel: Any) -> TrainResult | None:
    result: TrainResult | None = answer(channel.result.remote())
    return result


def answer(call: Any) -> Any:
    """Return the channel's answer to a call; raises TryAgain if the channel has died."""
    try:
        return ray.get(call)
    except RayActorError as error:
        raise TryAgain(
            "the process that connects the driver with its workers died; run the same command again to resume"
        ) from error


def _leaves_others(first: "Future[TrainResult]") -> bool:
    """True if the first trainer has ended and other workers may still train.

    Its workers have left, or could not restart because their node is gone.
    """
    error = first.exception()
    if error is None:
        return first.result().interrupted == LEFT
    return _no_room(error)


def _no_room(error: BaseException) -> bool:
    return isinstance(error, ControllerError) and not counts(error)


def _in_thread(work: Callable[[], TrainResult]) -> "Future[TrainResult]":
    # A daemon thread does not keep the process alive, and leaves the main thread free for signals.
    future: Future[TrainResult] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="train", daemon=True).start()
    return future


def in_place(config: Config, worker: Resources) -> bool:
    """True if workers may join and leave during a training: with strategy ddp, on CPUs, and a Ray that supports it.

    With ddp each worker has the complete base. On CPUs the workers connect over gloo; an exchange over NCCL cannot be
    aborted like one over gloo. Logs a warning if only the version of Ray prevents it.
    """
    if config.cluster.strategy != "ddp" or "GPU" in worker:
        return False
    if problem := ray_internals.replacement_problem():
        logger.warning(
            f"Ray {ray.__version__} differs from 2.60 inside ({problem}): when a worker is lost, all workers restart"
            " from the newest checkpoint"
        )
    return problem is None


def ray_trainer(
    spec: TrainSpec, root: str, worker: Mapping[str, float], channel: Any, group: WorkerGroup, changing: bool
) -> Any:
    """Return Ray's trainer for a group of workers, each with the resources of `worker`.

    `root` is the run folder. `changing`: workers may join and leave during the training (`in_place`).
    """
    from ray.train.torch import TorchTrainer

    # Ray's stubs describe Train V1. Train V2, which runs here, has more arguments.
    ray_train: Any = ray.train
    # Ray would retry with the same number of workers. A group of an elastic run that does not change in place gets
    # another number at each attempt, so every failure must return to `Attempts`, which chooses that number. A failure
    # of the controller returns there in all elastic runs: it means that the room for the group is gone.
    cluster = spec.config.cluster
    limits = {"max_failures": cluster.max_failures}
    if cluster.is_elastic():
        limits |= {"controller_failure_limit": 0}
    if cluster.is_elastic() and not changing:
        limits |= {"max_failures": 0, "max_preemption_failures": 0}
    torch_config: Any = InPlace() if changing else Together()
    checkpoints = storage.join(root, "checkpoints")
    # Not as train_loop_config: the controller unpickles that too, and would import torch for the spec.
    work: Any = partial(train_worker, spec, checkpoints, channel)
    if changing:
        entry = Entry(group.first_rank, group.attempt)
        work = LateStart(channel, ray.cloudpickle.dumps(partial(train_worker, spec, checkpoints, entry=entry)))
    # A spare takes no CPU, but Ray requires at least one resource above 0: one byte of memory.
    resources = {"CPU": 0.0, "memory": 1.0} if group.spare else dict(worker)
    # Ray's dashboard and metrics show the run by the name of its folder.
    parent, _, name = root.rpartition("/")
    ray_internals.forget_report(root)
    trainer = TorchTrainer(
        work,
        torch_config=torch_config,
        scaling_config=ray_train.ScalingConfig(
            num_workers=group.workers, use_gpu="GPU" in worker, resources_per_worker=resources
        ),
        run_config=ray_train.RunConfig(
            name=name,
            storage_path=parent,
            failure_config=ray_train.FailureConfig(**limits),
            callbacks=[TellDriver(channel)],
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
        ),
    )
    if ray_internals.replacement_problem():
        return trainer
    from olora_ray.cluster.membership.places import with_own_places

    return with_own_places(trainer)


def end_hung(member: Member) -> None:
    """Kill the process of a member that hangs, by a task on its node, without waiting for the task.

    Ray would keep the CPUs of such a worker for ten minutes: its own kill is a request to the process that hangs.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = NodeAffinitySchedulingStrategy(node_id=member.node, soft=False)
    ray.remote(kill_worker).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node).remote(member.process)


def kill_worker(process: int) -> bool:
    with contextlib.suppress(OSError):
        # Ray names its processes so. The number may belong to another process by now.
        if b"RayTrainWorker" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
            return True
    return False
