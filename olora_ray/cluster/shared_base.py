"""A process that trains several adapters side by side on one copy of the base model.

A Ray actor with a thread for each adapter; only the one whose turn it is computes. The result of each is the
same, bit for bit, as if it were alone: the base is frozen, every adapter has an optimizer, a data cursor and
random numbers of its own. What is shared is the memory of the base, and the time that starting takes.
"""

import gc
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from olora_ray.cluster.device import assigned_device
from olora_ray.cluster.failures import SharedBaseDied
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.train_worker import train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.common.errors import UserError
from olora_ray.common.quiet import quiet_transformers
from olora_ray.train.malloc import ONE_POOL

SPARE_THREADS = 8
"""Threads of an actor beyond those that train: to answer `busy`, and for a trial that ends while another starts."""


class SharedBaseActor:
    """Holds the base model of `spec`."""

    def __init__(self, spec: TrainSpec) -> None:
        quiet_transformers()
        self.spec = spec
        self.active = 0
        self._shared: SharedBase | None = None
        self._guard = threading.Lock()

    @ray.method(max_task_retries=-1)
    def busy(self) -> int:
        """How many adapters are being trained; who asks one that has died waits until it is there again."""
        return self.active

    def train(self, spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
        """Train one adapter from the start or from its last checkpoint; returns when it has ended."""
        self.active += 1
        try:
            return train_at(SharedBaseContext(self._base()), spec, checkpoints, channel)
        except UserError as error:
            return TrainResult(problem=str(error))
        finally:
            self.active -= 1
            gc.collect()  # a Worker refers to itself: else its adapter and optimizer would stay in memory for long

    def _base(self) -> SharedBase:
        with self._guard:
            if self._shared is None:
                self._shared = SharedBase.of(self.spec, assigned_device())
            return self._shared


def start_actors(spec: TrainSpec, wanted: Mapping[str, float], number: int, adapters: int) -> tuple[Any, ...]:
    """So many actors for so many adapters each, with the resources of one worker; they end with this process."""
    actor: Any = ray.remote(SharedBaseActor)
    options = {
        "num_cpus": wanted.get("CPU", 0),
        "num_gpus": wanted.get("GPU", 0),
        "max_concurrency": adapters + SPARE_THREADS,
        "runtime_env": {"env_vars": ONE_POOL},
        "max_restarts": -1,  # the trials of an actor that died resume from their checkpoints
    }
    return tuple(actor.options(**options).remote(spec) for _ in range(number))


def end_actors(actors: tuple[Any, ...]) -> None:
    """End them, so that what follows gets their CPUs and GPUs."""
    for one in actors:
        ray.kill(one)


def train_on(actors: tuple[Any, ...], spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
    """Train one adapter on the actor with the fewest; raises SharedBaseDied."""
    try:
        loads = ray.get([actor.busy.remote() for actor in actors])
        result: TrainResult = ray.get(actors[loads.index(min(loads))].train.remote(spec, checkpoints, channel))
    except RayActorError as error:
        raise SharedBaseDied from error
    return result
