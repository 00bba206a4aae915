"""A process that trains several adapters side by side on one copy of the base model.

A Ray actor with a thread for each adapter; only the one whose turn it is computes. The result of each is the
same, bit for bit, as if it were alone: the base is frozen, every adapter has an optimizer, a data cursor and
random numbers of its own. What is shared is the memory of the base, and the time that starting takes.
"""

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
from olora_ray.cluster.worker import train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext, assigned_device
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.logs import quiet_transformers

logger = logging.getLogger(__name__)

SPARE_THREADS = 8
"""Threads of an actor beyond those that train: to answer `busy`, and for a trial that ends while another starts."""
EXPECTED = 30.0
"""Seconds for which a place is kept for a trial that has taken it and does not train yet: it may have died since."""
ANSWERS = 10.0
"""Seconds in which an actor tells its load. One whose node is lost does so when there is room for it on another one, if
ever."""
FULL = 0.5
"""Seconds from one look for a place to the next where all are taken."""


class SharedBaseActor:
    """Holds the base model of `spec`."""

    def __init__(self, spec: TrainSpec) -> None:
        quiet_transformers()
        self.spec = spec
        self._shared: SharedBase | None = None
        self._loading = threading.Lock()
        self._until: dict[str, float] = {}
        """Who trains here, or is expected to, and until when they are counted."""
        self._counting = threading.Lock()

    @ray.method(max_task_retries=-1)
    def busy(self) -> int:
        """How many adapters are being trained; who asks one that has died waits until it is there again."""
        with self._counting:
            return self._busy()

    @ray.method(max_task_retries=-1)
    def take(self, name: str, seen: int) -> bool:
        """Count somebody who is about to train, unless others have come or gone since `busy` was `seen`."""
        with self._counting:
            if name not in self._until and self._busy() != seen:
                return False
            self._until[name] = time.monotonic() + EXPECTED
            return True

    def train(self, name: str, spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
        """Train one adapter from the start or from its last checkpoint; returns when it has ended."""
        with self._counting:
            self._until[name] = math.inf
        try:
            return train_at(SharedBaseContext(self._base()), spec, checkpoints, channel)
        except UserError as error:
            return TrainResult(problem=str(error), passes=isinstance(error, TryAgain))
        finally:
            with self._counting:
                del self._until[name]
            gc.collect()  # a Worker refers to itself: else its adapter and optimizer would stay in memory for long

    def _busy(self) -> int:
        now = time.monotonic()
        self._until = {name: end for name, end in self._until.items() if end > now}
        return len(self._until)

    def _base(self) -> SharedBase:
        with self._loading:
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


def train_on(actors: tuple[Any, ...], adapters: int, spec: TrainSpec, checkpoints: str, channel: Any) -> TrainResult:
    """Train one adapter on the actor with the fewest, of those with less than `adapters`; raises SharedBaseDied."""
    name = uuid.uuid4().hex
    try:
        actor = place_on(actors, name, adapters)
        result: TrainResult = ray.get(actor.train.remote(name, spec, checkpoints, channel))
    except RayActorError as error:
        raise SharedBaseDied from error
    return result


def place_on(actors: tuple[Any, ...], name: str, adapters: int) -> Any:
    """The actor with the fewest, which from now on counts `name` too: those who ask at the same time share them out.

    Waits until one has less than `adapters`: it has no memory for more. Those that do not answer are passed over while
    others do; where their node is lost, they wait for another one.
    """
    asked: dict[int, Any] = {}
    while True:
        loads = _loads(actors, asked)
        fewest, place = min(((load, place) for place, load in loads.items()), default=(adapters, 0))
        if fewest >= adapters:
            time.sleep(FULL)
        elif _takes(actors[place], name, fewest):
            return actors[place]


def _loads(actors: tuple[Any, ...], asked: dict[int, Any]) -> dict[int, int]:
    """Place in `actors` -> adapters, of those that answer; `asked` keeps the calls to the others."""
    for place, actor in enumerate(actors):
        if place not in asked:  # else its calls would pile up until it is there again
            asked[place] = actor.busy.remote()
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWERS)
    found = {place: asked.pop(place) for place in range(len(actors)) if asked[place] in answered}
    if found and asked:
        _tell_of_silent()
    return {place: ray.get(call) for place, call in found.items()}


def _takes(actor: Any, name: str, seen: int) -> bool:
    """Whether the actor counts `name` now; not if it was lost since it told its load."""
    try:
        return bool(ray.get(actor.take.remote(name, seen), timeout=ANSWERS))
    except GetTimeoutError:
        return False


@cache  # once a process, and not for each of its trials
def _tell_of_silent() -> None:
    logger.warning(
        "search: not every process that holds the base model answers (its node is lost, or it still starts): trials go"
        " to the others"
    )
