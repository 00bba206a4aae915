"""Schedule of a run and loader of one worker: reads its micro-batches of global step k from the token store.

Global step k takes sequences [k G, (k + 1) G) of the order, cut into M micro-batches of which the last may be shorter:
what is computed together depends on the step alone. Worker w of W takes whole micro-batches, those from w M // W to
(w + 1) M // W; of more workers than micro-batches some have none. The last step of a run is filled up from the next
pass, so no step is short.

The store may still be growing: the first pass goes through it in its own order, so a step needs the shards
up to its own only; a later pass needs all.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from olora_ray.common import collectives
from olora_ray.config.schema import Train
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import TokenStore

Waiting = Callable[[int, int], None]
"""Told about once a second what is waited for: number of the shard, shards of the store. May raise to give up."""

PAUSES = (0.3, 1.0)
"""Seconds between two looks at a growing store: at first, and at most."""


@dataclass(frozen=True)
class StepData:
    """One worker's data of one step."""

    micro: tuple[Batch, ...]
    sequences: tuple[tuple[int, ...], ...]
    """Indices in the store, one group per micro-batch."""
    first: int
    """Number of the first of these micro-batches among those of the step."""
    count: int
    """Micro-batches of the step, over all workers."""
    supervised: int
    """Supervised tokens of the global batch, over all workers."""
    padding_batches: int
    """Micro-batches fewer than the worker that has the most."""
    padding: Batch
    """A micro-batch of this step, to be run in their place where all workers must run the model equally often."""


class StepLoader:
    """Reads steps of one worker, one step ahead of the training."""

    def __init__(
        self,
        store: TokenStore,
        train: Train,
        seed: int,
        attention: str,
        worker: int = 0,
        workers: int = 1,
        waiting: Waiting | None = None,
    ) -> None:
        """`waiting` is called while a step waits for shards of a growing store."""
        assert 0 <= worker < workers
        self.store, self.train, self.seed, self.attention = store, train, seed, attention
        self.worker, self.workers, self.waiting = worker, workers, waiting

    def read(self, step: int) -> StepData:
        """The data of global step `step`, counted from 0; waits for the shards that it needs."""
        until(self.store, lambda: self._there(step), self.waiting)
        return self._read(step)

    def steps(self, start: int, ends: Callable[[int], bool | None]) -> Iterator[tuple[StepData, float]]:
        """The steps from `start` on, each with the seconds that were spent waiting for it.

        `ends(n)` says whether the run is over after n steps, None while the store does not tell yet. The
        next step is read while the caller works on this one, and asked for only when the caller comes back.
        """
        left = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            try:
                ahead = reader.submit(self._next, start, ends, left)
                for following in itertools.count(start + 1):
                    began = time.perf_counter()
                    data = self._result(ahead)
                    if data is None:
                        return
                    waited = time.perf_counter() - began
                    ahead = reader.submit(self._next, following, ends, left)
                    yield data, waited
            finally:
                left.set()  # else the pool would wait here for its reader, which may be waiting for a shard

    def _next(self, step: int, ends: Callable[[int], bool | None], left: threading.Event) -> StepData | None:
        """The data of a step once the store has it; None after the last step, or when the caller has left."""
        until(self.store, lambda: left.is_set() or ends(step) is not None, pause=left.wait)
        if left.is_set() or ends(step):
            return None
        until(self.store, lambda: left.is_set() or self._there(step), pause=left.wait)
        return None if left.is_set() else self._read(step)

    def _result(self, ahead: "Future[StepData | None]") -> StepData | None:
        """The reader's result. `waiting` is called here, in the caller's thread, when the caller really waits."""
        while not wait([ahead], PAUSES[1]).done:
            tell(self.store, self.waiting)
        return ahead.result()

    def _there(self, step: int) -> bool:
        return (step + 1) * self.train.global_batch <= self.store.available or self.store.total is not None

    def _read(self, step: int) -> StepData:
        size, width = self.train.global_batch, self.train.micro_batch
        sequences = [int(i) for i in self.store.order(self.seed, step * size, (step + 1) * size)]
        every = [tuple(sequences[i : i + width]) for i in range(0, size, width)]
        own = collectives.share(len(every), self.worker, self.workers)
        micro = tuple(self._batch(group) for group in every[own.start : own.stop])
        return StepData(
            micro=micro,
            sequences=tuple(every[own.start : own.stop]),
            first=own.start,
            count=len(every),
            supervised=self.store.supervised(sequences),
            padding_batches=-(-len(every) // self.workers) - len(own),
            padding=micro[-1] if micro else self._batch(every[0]),
        )

    def _batch(self, group: Sequence[int]) -> Batch:
        return collate([self.store[i] for i in group], self.attention)


def until(
    store: TokenStore,
    ready: Callable[[], bool],
    waiting: Waiting | None = None,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until `ready()`, looking for more of the store now and then; raises what `waiting` raises."""
    seconds, told = PAUSES[0], time.monotonic()
    while not ready():
        store.refresh()
        if ready():
            return
        pause(seconds)
        seconds = min(seconds * 1.3, PAUSES[1])
        if time.monotonic() - told >= PAUSES[1]:
            told = time.monotonic()
            tell(store, waiting)


def tell(store: TokenStore, waiting: Waiting | None) -> None:
    """Call `waiting`, unless all shards are there: then something else takes its time."""
    if waiting and store.total is None:
        waiting(store.available_shards, store.shard_count)


def total_steps(train: Train, packs: int) -> int:
    """Optimizer steps of a run over `packs` sequences."""
    return train.steps or max(1, -(-round(train.epochs * packs) // train.global_batch))


# Schedule of a run: its length and the learning rate of each step, also while the token store is still growing.


def lr_at(step: int, steps: int, config: Train) -> float:
    """Learning rate of update number `step` (from 0) of `steps`: linear warm-up, then the schedule.

    cosine and linear reach 0 after the last step.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * shape(config.schedule, (step - warmup) / max(1, steps - warmup))


def shape(schedule: str, progress: float) -> float:
    """The share of the peak rate at `progress`, 0 to 1, between the end of the warm-up and that of the run."""
    shapes = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }
    return shapes[schedule]


class Schedule:
    """Length and learning rates of a run."""

    def __init__(self, train: Train, store: TokenStore, waiting: Waiting | None = None) -> None:
        """`waiting` is called while `last` and `lr` wait for shards."""
        self.train, self.store, self.waiting = train, store, waiting

    def total(self) -> int | None:
        """Steps of the run; None while the store does not tell yet."""
        if self.train.steps is None and self.store.total is None:
            self.store.refresh()
        return self._total()

    def ends(self, steps_done: int) -> bool | None:
        """True if the run is over after so many steps; None while that is not certain. Does not look for shards."""
        total = self._total()
        if total is not None:
            return steps_done >= total
        # More sequences never make fewer steps.
        return False if steps_done < total_steps(self.train, self.store.available) else None

    def last(self, steps_done: int) -> bool:
        """True if the run is over after so many steps; waits for shards until it is certain."""
        until(self.store, lambda: self.ends(steps_done) is not None, self.waiting)
        return bool(self.ends(steps_done))

    def lr(self, step: int) -> float:
        """Learning rate of update number `step`, from 0; waits for the shards that the step reads."""
        size = self.train.global_batch
        if self.train.steps is None:
            until(self.store, lambda: self._knows((step + 1) * size), self.waiting)
        total = self._total()
        if total is not None and (self.train.steps is not None or self.store.shard_count == 1):
            return lr_at(step, total, self.train)
        warmup, begin = self.train.warmup, self._progress(step * size, after=False)
        if begin < warmup:
            return self.train.lr * min(1.0, self._progress((step + 1) * size - 1, after=True) / warmup)
        return self.train.lr * shape(self.train.schedule, (begin - warmup) / (1.0 - warmup))

    def _total(self) -> int | None:
        packs = self.store.total
        return self.train.steps or (None if packs is None else total_steps(self.train, packs))

    def _knows(self, places: int) -> bool:
        return self.store.total is not None or (self.store.shard_count > 1 and places <= self.store.available)

    def _progress(self, place: int, after: bool) -> float:
        """Progress at, or just after, a place of the training order; 0 to 1."""
        packs = self.store.total
        epoch, inside = divmod(place, packs) if packs else (0, place)
        if epoch == 0:
            shard, row, rows = self.store.locate(inside)
            fraction = (shard + (row + after) / rows) / self.store.shard_count
        else:
            assert packs is not None
            fraction = (inside + after) / packs
        # A part of an epoch can lie in shards that are smaller than the others.
        return min(1.0, (epoch + fraction) / self.train.epochs)
