"""Schedule of a run, and loader of the micro-batches of one worker from the token store.

Global step k takes sequences [k G, (k + 1) G) of the order, cut into M micro-batches, of which the last may be shorter.
So the micro-batches depend on the step alone. Worker w of W takes the micro-batches from w M // W to (w + 1) M // W;
with more workers than micro-batches some workers have none. The last step of a run is filled up from the next pass, so
no step is short.

The store may still be growing. The first pass reads it in its own order, so a step needs no shard beyond its own; a
later pass needs all shards.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from olora_ray.common import collectives
from olora_ray.config.decided import DecidedTrain
from olora_ray.config.schema import Train
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.plan import Counts
from olora_ray.tokens.store import TokenStore

Waiting = Callable[[int, int], None]
"""Called about once a second during a wait, with the awaited shard and the number of shards. May raise to give up."""

PAUSES = (0.3, 1.0)
"""First and longest pause in seconds between two looks at a growing store."""


@dataclass(frozen=True)
class StepData:
    micro: tuple[Batch, ...]
    sequences: tuple[tuple[int, ...], ...]
    """Indices in the store, one group per micro-batch."""
    first: int
    """Index in the step of this worker's first micro-batch."""
    count: int
    """Number of micro-batches of the step, over all workers."""
    whole: Counts
    """Size of the global batch, over all workers."""
    padding_batches: int
    """Number of micro-batches that this worker has less than the worker with the most."""
    padding: Batch
    """A micro-batch of this step, for the `padding_batches` extra runs of the model with a sharded base."""


class StepLoader:
    """Loader of the data of one worker, one step ahead of the training."""

    def __init__(
        self,
        store: TokenStore,
        train: DecidedTrain,
        seed: int,
        attention: str,
        worker: int = 0,
        workers: int = 1,
        waiting: Waiting | None = None,
    ) -> None:
        assert 0 <= worker < workers
        self.store, self.train, self.seed, self.attention = store, train, seed, attention
        self.worker, self.workers, self.waiting = worker, workers, waiting

    def read(self, step: int) -> StepData:
        """Return the data of global step `step`, counted from 0; waits for the shards that it needs."""
        until(self.store, lambda: self._available(step), self.waiting)
        return self._read(step)

    def steps(
        self, start: int, ends: Callable[[int], bool | None]
    ) -> Iterator[tuple[StepData, float]]:
        """Yield the data of the steps from `start` on, each with the seconds spent waiting for it.

        `ends(n)` is True if the run is over after n steps, and None while the store is too short to tell. The next
        step is read in the background while the caller works on the current one.
        """
        stopped = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            try:
                ahead = reader.submit(self._next, start, ends, stopped)
                for following in itertools.count(start + 1):
                    began = time.perf_counter()
                    data = self._result(ahead)
                    if data is None:
                        return
                    waited = time.perf_counter() - began
                    ahead = reader.submit(self._next, following, ends, stopped)
                    yield data, waited
            finally:
                stopped.set()  # otherwise the pool would wait here for its reader, which may be waiting for a shard

    def _next(
        self, step: int, ends: Callable[[int], bool | None], stopped: threading.Event
    ) -> StepData | None:
        until(self.store, lambda: stopped.is_set() or ends(step) is not None, pause=stopped.wait)
        if stopped.is_set() or ends(step):
            return None
        until(self.store, lambda: stopped.is_set() or self._available(step), pause=stopped.wait)
        return None if stopped.is_set() else self._read(step)

    def _result(self, ahead: "Future[StepData | None]") -> StepData | None:
        # `waiting` is called in the caller's thread, and not by the reader, which waits for shards ahead of need.
        while not wait([ahead], PAUSES[1]).done:
            tell(self.store, self.waiting)
        return ahead.result()

    def _available(self, step: int) -> bool:
        return (
            step + 1
        ) * self.train.global_batch <= self.store.available or self.store.total is not None

    def _read(self, step: int) -> StepData:
        size, width = self.train.global_batch, self.train.micro_batch
        sequences = [int(i) for i in self.store.order(self.seed, step * size, (step + 1) * size)]
        groups = [tuple(sequences[i : i + width]) for i in range(0, size, width)]
        own = collectives.share(len(groups), self.worker, self.workers)
        micro = tuple(self._batch(group) for group in groups[own.start : own.stop])
        return StepData(
            micro=micro,
            sequences=tuple(groups[own.start : own.stop]),
            first=own.start,
            count=len(groups),
            whole=self.store.counts(sequences),
            padding_batches=-(-len(groups) // self.workers) - len(own),
            padding=micro[-1] if micro else self._batch(groups[0]),
        )

    def _batch(self, group: Sequence[int]) -> Batch:
        return collate([self.store[i] for i in group], self.attention)


def until(
    store: TokenStore,
    ready: Callable[[], bool],
    waiting: Waiting | None = None,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until `ready()`, with looks for new shards in between; raises what `waiting` raises."""
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
    """Call `waiting` if shards are missing; otherwise the wait has another reason."""
    if waiting and store.total is None:
        waiting(store.available_shards, store.shard_count)


def total_steps(train: Train, packs: int) -> int:
    return train.steps or max(1, -(-round(train.epochs * packs) // train.global_batch))


def planned_steps(train: Train, store: TokenStore) -> int:
    """Return about how many steps a run will have; the same number however far the store has been written.

    The store has at least one sequence.
    """
    return total_steps(train, store.locate(0)[2] * store.shard_count)


# Schedule of a run: its length and the learning rate of each step, even while the token store is still growing.


def lr_at(step: int, steps: int, config: Train, peak: float) -> float:
    """Return the learning rate of update `step` (from 0) of `steps`: linear warm-up, then the schedule.

    cosine and linear reach 0 after the last step.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * shape(config.schedule, (step - warmup) / max(1, steps - warmup))


def shape(schedule: str, progress: float) -> float:
    """Return the share of the peak rate at `progress`: 0 at the end of the warm-up, 1 at the end of the run."""
    shapes = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }
    return shapes[schedule]


class Schedule:
    def __init__(
        self,
        train: Train,
        store: TokenStore,
        waiting: Waiting | None = None,
        auto: float | None = None,
    ) -> None:
        """`auto` is the automatic learning rate, which a training with train.lr=auto needs."""
        self.train, self.store, self.waiting, self.auto = train, store, waiting, auto

    def peak(self) -> float:
        rate = self.auto if self.train.lr == "auto" else self.train.lr
        assert rate is not None, "train.lr=auto: not measured yet"
        return rate * self.train.lr_factor

    def total(self) -> int | None:
        """Return the steps of the run; None while the store is too short to tell."""
        if self.train.steps is None and self.store.total is None:
            self.store.refresh()
        return self._total()

    def ends(self, steps_done: int) -> bool | None:
        """Return True if the run is over after `steps_done` steps, None while this is unknown; looks for no shards."""
        total = self._total()
        if total is not None:
            return steps_done >= total
        # More sequences never make fewer steps, so the shards that exist give a lower bound.
        return False if steps_done < total_steps(self.train, self.store.available) else None

    def last(self, steps_done: int) -> bool:
        """Return True if the run is over after `steps_done` steps; waits for shards until this is known."""
        until(self.store, lambda: self.ends(steps_done) is not None, self.waiting)
        return bool(self.ends(steps_done))

    def lr(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0; waits for the shards that the step reads."""
        size = self.train.global_batch
        if self.train.steps is None:
            until(self.store, lambda: self._knows((step + 1) * size), self.waiting)
        total = self._total()
        if total is not None and (self.train.steps is not None or self.store.shard_count == 1):
            return lr_at(step, total, self.train, self.peak())
        # With several shards the progress counts shards, even if all are written already. Otherwise the learning rates
        # would depend on how fast the shards were written.
        warmup, begin = self.train.warmup, self._progress(step * size, after=False)
        if begin < warmup:
            return self.peak() * min(
                1.0, self._progress((step + 1) * size - 1, after=True) / warmup
            )
        return self.peak() * shape(self.train.schedule, (begin - warmup) / (1.0 - warmup))

    def _total(self) -> int | None:
        packs = self.store.total
        return self.train.steps or (None if packs is None else total_steps(self.train, packs))

    def _knows(self, sequences: int) -> bool:
        return self.store.total is not None or (
            self.store.shard_count > 1 and sequences <= self.store.available
        )

    def _progress(self, position: int, after: bool) -> float:
        packs = self.store.total
        epoch, inside = divmod(position, packs) if packs else (0, position)
        if epoch == 0:
            shard, row, rows = self.store.locate(inside)
            fraction = (shard + (row + after) / rows) / self.store.shard_count
        else:
            assert packs is not None
            fraction = (inside + after) / packs
        # Above 1 if the last, partial epoch reads shards that are smaller than the others.
        return min(1.0, (epoch + fraction) / self.train.epochs)
