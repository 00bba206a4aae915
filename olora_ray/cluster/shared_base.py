"""A process that trains several adapters side by side on one copy of the base model.

It is a Ray actor with a thread per adapter. The threads compute in turns. Each result is the same, bit for bit, as that
of a training alone: the base is frozen, and every adapter has its own optimizer, data cursor and random numbers. The
adapters share the memory of the base and the time of its start.
"""

import contextlib
import gc
import logging
import math
import threading
import time
import uuid
from collections.abc import Mapping
from functools import cache
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from olora_ray.cluster.failures import SharedBaseDied
from olora_ray.cluster.malloc import ONE_POOL
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.start import check_base
from olora_ray.cluster.worker import train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext, assigned_device
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.logs import quiet_transformers

logger = logging.getLogger(__name__)

SPARE_THREADS = 8
"""Threads of an actor that do not train: they answer `busy`, and serve a trial that ends while another starts."""
EXPECTED = 30.0
"""Seconds for which a slot stays reserved for a trial that does not train yet, because the trial may have died."""
ANSWERS = 10.0
"""Timeout for an actor's answer. An actor whose node is lost answers only after it gets room on another node."""
FULL = 0.5
"""Seconds between two searches for a free slot while all are taken."""


def self_test(shared: SharedBase, spec: TrainSpec) -> None:
    """Test the base, and give it the attention that passes. Raises UserError if none does."""
    check_base(shared.loss, spec, shared.device)


class SharedBaseActor:
    """Holder of the base model of `spec`. Each adapter that trains on it, or is about to, takes a slot."""

    def __init__(self, spec: TrainSpec) -> None:
        quiet_transformers()
        self.spec = spec
        self._shared: SharedBase | None = None
        self._loading = threading.Lock()
        self._until: dict[str, float] = {}
        """Name -> time at which its slot expires: infinity for an adapter that trains."""
        self._counting = threading.Lock()

    @ray.method(max_task_retries=-1)
    def busy(self) -> int:
        """Return the number of taken slots. A call to an actor that has died waits for its restart."""
        with self._counting:
            return self._busy()

    @ray.method(max_task_retries=-1)
    def take(self, name: str, seen: int) -> bool:
        """Take a slot for `name`. False if the number of taken slots is no longer `seen`."""
        with self._counting:
            if name not in self._until and self._busy() != seen:
                return False
            self._until[name] = time.monotonic() + EXPECTED
            return True

    def train(self, name: str, spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
        with self._counting:
            self._until[name] = math.inf
        try:
            with self._loading:
                if self._shared is None:
                    self._shared = SharedBase.of(self.spec, assigned_device())
            return train_at(SharedBaseContext(self._shared), spec, checkpoints, channel)
        except UserError as error:
            return TrainResult(problem=str(error), passes=isinstance(error, TryAgain))
        finally:
            with self._counting:
                del self._until[name]
            # A Worker refers to itself, so its adapter and optimizer would stay in memory until a later collection.
            gc.collect()

    def _busy(self) -> int:
        now = time.monotonic()
        self._until = {name: end for name, end in self._until.items() if end > now}
        return len(self._until)


def start_actors(
    spec: TrainSpec, wanted: Mapping[str, float], number: int, adapters: int
) -> tuple[Any, ...]:
    """Start `number` actors with `adapters` slots each and the resources of one worker. They end with this process."""
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
    for actor in actors:
        ray.kill(actor)


def train_on(
    actors: tuple[Any, ...], adapters: int, spec: TrainSpec, checkpoints: str, channel: Any
) -> TrainResult:
    """Train one adapter on an actor with a free slot (`place_on`). Raises SharedBaseDied if the actor dies."""
    name = uuid.uuid4().hex
    try:
        actor = place_on(actors, name, adapters)
        result: TrainResult = ray.get(actor.train.remote(name, spec, checkpoints, channel))
    except RayActorError as error:
        raise SharedBaseDied from error
    return result


def place_on(actors: tuple[Any, ...], name: str, adapters: int) -> Any:
    """Take a slot for `name` on the actor with the fewest taken slots, and return the actor.

    Waits until an actor has fewer than `adapters` taken slots, because it has no memory for more. An actor that does
    not answer is skipped while others answer.
    """
    calls: dict[int, Any] = {}
    while True:
        loads = _loads(actors, calls)
        fewest, index = min(((load, index) for index, load in loads.items()), default=(adapters, 0))
        if fewest >= adapters:
            time.sleep(FULL)
            continue
        # Several trials may have read the same load. Only the first gets the slot, and the others look again. A slow
        # actor counts as one without a free slot.
        with contextlib.suppress(GetTimeoutError):
            if ray.get(actors[index].take.remote(name, fewest), timeout=ANSWERS):
                return actors[index]


def _loads(actors: tuple[Any, ...], calls: dict[int, Any]) -> dict[int, int]:
    """Return index -> taken slots of the actors that answer. `calls` keeps the pending calls to the others."""
    for index, actor in enumerate(actors):
        if index not in calls:  # one pending call per actor: more would pile up until it restarts
            calls[index] = actor.busy.remote()
    answered, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWERS)
    answers = {index: calls.pop(index) for index in range(len(actors)) if calls[index] in answered}
    if answers and calls:
        _tell_of_silent()
    return {index: ray.get(call) for index, call in answers.items()}


@cache  # one warning per process, not one per trial
def _tell_of_silent() -> None:
    logger.warning(
        "search: a process that holds the base model does not answer (it is still starting, or its node is lost);"
        " trials use the other processes"
    )
