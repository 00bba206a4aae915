"""The driver's side of a group of workers: start it, wait for its end, and end the workers that hang."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import Member
from olora_ray.cluster.resources import free_abandoned
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.train_backend import Together
from olora_ray.cluster.worker import train_worker
from olora_ray.common import storage
from olora_ray.common.errors import TryAgain

ENDING = 10.0
"""Seconds in which a group ends by itself after a training. One that waits for room for a worker does not."""

Fit = Callable[[int], TrainResult]
"""Function that trains with this many workers, from the newest checkpoint."""


class Group:
    """A group of workers that trains in a thread of the driver."""

    def __init__(self, fit: Fit, workers: int, channel: Any) -> None:
        self.workers = workers
        self.channel = channel
        self._future: Future[TrainResult] = Future()
        # A daemon thread does not keep the process alive, and leaves the main thread free for signals.
        threading.Thread(target=self._run, args=[fit, workers], name="train", daemon=True).start()

    def _run(self, fit: Fit, workers: int) -> None:
        try:
            self._future.set_result(fit(workers))
        except BaseException as error:
            self._future.set_exception(error)

    def begin(self) -> None:
        """Let the channel forget this group, because another one follows."""
        answer(self.channel.begin.remote())

    def answered(self) -> TrainResult | None:
        """Return the result that rank 0 has sent; None before."""
        result: TrainResult | None = answer(self.channel.result.remote())
        return result

    def members(self, silence: float) -> tuple[list[Member], list[Member]]:
        """Return the workers, and those among them that gave no sign of life for `silence` seconds."""
        members: tuple[list[Member], list[Member]] = answer(self.channel.members.remote(silence))
        return members

    def leaving(self, members: Iterable[Member]) -> set[str]:
        """Return the nodes of these workers that will be taken away."""
        return ray_internals.draining_nodes() & {member.node for member in members}

    def end_hung(self, silent: Iterable[Member]) -> None:
        """End the workers that hang, and with them the group."""
        for member in silent:
            end_hung(member)
        ray_internals.end_train_controllers()

    def ended(self) -> bool:
        """True if no worker trains any more. Waits up to 0.2 s."""
        return bool(wait([self._future], 0.2).done)

    def result(self) -> TrainResult:
        return self._future.result()

    def end(self, at_once: bool = False) -> None:
        """End the workers, so that they free their CPUs and memory. `at_once`: kill them without asking first."""
        if not self._future.done() and not at_once:
            self.channel.request_stop.remote("training has ended")
            wait([self._future], ENDING)
        if not self._future.done():
            ray_internals.end_train_controllers()
            wait([self._future], ENDING)
        free_abandoned()  # killed controllers leave their placement groups behind


def answer(call: Any) -> Any:
    """Return the channel's answer to a call; raises TryAgain if the channel has died."""
    try:
        return ray.get(call)
    except RayActorError as error:
        raise TryAgain(
            "the process that connects the driver with its workers died; run the same command again to resume"
        ) from error


def ray_trainer(
    spec: TrainSpec, root: str, worker: Mapping[str, float], channel: Any, workers: int
) -> Any:
    """Return Ray's trainer for a group of workers, each with the resources of `worker`. `root` is the run folder."""
    from ray.train.torch import TorchTrainer

    # Ray's stubs describe Train V1. Train V2, which runs here, has more arguments.
    ray_train: Any = ray.train
    torch_config: Any = Together()
    # Not as train_loop_config: the controller unpickles that too, and would import torch for the spec.
    work: Any = partial(train_worker, spec, storage.join(root, "checkpoints"), channel)
    # Every failure returns to the driver, which chooses the number of workers of the next group.
    failures = ray_train.FailureConfig(
        max_failures=0, controller_failure_limit=0, max_preemption_failures=0
    )
    # Ray's dashboard and metrics show the run by the name of its folder.
    parent, _, name = root.rpartition("/")
    ray_internals.forget_report(root)
    trainer = TorchTrainer(
        work,
        torch_config=torch_config,
        scaling_config=ray_train.ScalingConfig(
            num_workers=workers, use_gpu="GPU" in worker, resources_per_worker=dict(worker)
        ),
        run_config=ray_train.RunConfig(
            name=name,
            storage_path=parent,
            failure_config=failures,
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
        ),
    )
    return ray_internals.without_helpers(trainer)


def end_hung(member: Member) -> None:
    """Kill the process of a worker that hangs, by a task on its node, without waiting for the task.

    Ray would keep the CPUs of such a worker for ten minutes: its own kill is a request to the process that hangs.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = NodeAffinitySchedulingStrategy(node_id=member.node, soft=False)
    ray.remote(kill_worker).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node).remote(
        member.process
    )


def kill_worker(process: int) -> bool:
    with contextlib.suppress(OSError):
        # Ray names its processes so. The number may belong to another process by now.
        if b"RayTrainWorker" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
            return True
    return False
