"""Schedule of a run, and loader of the micro-batches of one worker from the token store.

Global step k takes sequences [k G, (k + 1) G) of the order, cut into M micro-batches, of which the last may be shorter.
So the micro-batches depend on the step alone. Worker w of W takes the micro-batches from w M // W to (w + 1) M // W;
with more workers than micro-batches some workers have none. The last step of a run is filled up from the next pass, so
no step is short.

The store may still be written (tokens/arrival.py). The first pass reads it in its own order, so a step needs no shard
beyond its own; a later pass needs all shards.
"""

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from olora_ray.common import collectives
from olora_ray.config.decided import DecidedTrain
from olora_ray.config.schema import Train
from olora_ray.config.section import is_auto
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.plan import Counts
from olora_ray.tokens.store import TokenStore


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
    ) -> None:
        assert 0 <= worker < workers
        self.store = store
        self.train = train
        self.seed = seed
        self.attention = attention
        self.worker = worker
        self.workers = workers

    def read(self, step: int) -> StepData:
        """Return the data of global step `step`, counted from 0; waits for the shards that it needs."""
        size = self.train.global_batch
        width = self.train.micro_batch
        self.store.wait((step + 1) * size)
        sequences = self.store.order(self.seed, step * size, (step + 1) * size).tolist()
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

    def steps(self, start: int, schedule: "Schedule") -> Iterator[tuple[StepData, float]]:
        """Yield the data of the steps from `start` on, each with the seconds spent waiting for it.

        The next step is read in the background while the caller works on the current one, if its shards are there.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            ahead = reader.submit(self._ahead, start, schedule)
            for step in itertools.count(start):
                began = time.perf_counter()
                if schedule.last(step):
                    return
                data = ahead.result() or self.read(step)
                waited = time.perf_counter() - began
                ahead = reader.submit(self._ahead, step + 1, schedule)
                yield data, waited

    def _ahead(self, step: int, schedule: "Schedule") -> StepData | None:
        # It does not wait: whoever leaves `steps` waits for the reader.
        there = self.store.has((step + 1) * self.train.global_batch)
        return self.read(step) if there and not schedule.may_end(step) else None

    def _batch(self, group: Sequence[int]) -> Batch:
        return collate([self.store[i] for i in group], self.attention)


def total_steps(train: Train, packs: int) -> int:
    return train.steps or max(1, -(-round(train.epochs * packs) // train.global_batch))


def known_steps(train: Train, store: TokenStore) -> int | None:
    """Return the steps of a run; None while shards are missing that decide it. Looks for new shards."""
    if train.steps:
        return train.steps
    if not store.has(sys.maxsize):
        return None
    return total_steps(train, len(store))


def planned_steps(train: Train, store: TokenStore) -> int:
    """Return about how many steps a run will have; the same number however far the store has been written.

    Waits for the first sequence.
    """
    store.wait(1)
    packs_of_first_shard = store.locate(0)[2]
    return total_steps(train, packs_of_first_shard * store.shard_count)


# Schedule of a run: its length and the learning rate of each step, even while the token store is still being written.


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
    def __init__(self, train: Train, store: TokenStore, auto: float | None = None) -> None:
        """`auto` is the automatic learning rate, which a training with train.lr=auto needs."""
        self.train = train
        self.store = store
        self.auto = auto

    def peak(self) -> float:
        rate = self.auto if is_auto(self.train.lr) else self.train.lr
        assert rate is not None, "train.lr=auto: not measured yet"
        return rate * self.train.lr_factor

    def may_end(self, steps_done: int) -> bool:
        """Return False if the run is not over after `steps_done` steps; True if it is, or it is not known yet."""
        # More sequences never make fewer steps, so the shards that exist give a lower bound.
        return steps_done >= (self.train.steps or total_steps(self.train, len(self.store)))

    def last(self, steps_done: int) -> bool:
        """Return True if the run is over after `steps_done` steps; waits for shards until this is known."""
        if self.train.steps is not None:
            return steps_done >= self.train.steps
        packs = len(self.store)
        while steps_done >= total_steps(self.train, packs):
            before = packs
            packs = self.store.wait(before + 1)
            if packs == before:
                return True
        return False

    def lr(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0; waits for the shards that the step reads."""
        train = self.train
        if train.steps is not None:
            return lr_at(step, train.steps, train, self.peak())
        size = train.global_batch
        packs = self.store.wait((step + 1) * size)
        if self.store.shard_count == 1:
            return lr_at(step, total_steps(train, packs), train, self.peak())
        # With several shards the progress counts shards, even if all are written already. Otherwise the learning rates
        # would depend on how fast the shards were written.
        begin = self._progress(step * size, after=False)
        if begin < train.warmup:
            end = self._progress((step + 1) * size - 1, after=True)
            return self.peak() * min(1.0, end / train.warmup)
        return self.peak() * shape(train.schedule, (begin - train.warmup) / (1.0 - train.warmup))

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
