"""What one worker takes from the token store: its micro-batches of global step k.

Global step k takes sequences [k G, (k + 1) G) of the order; of these, worker w of W takes the w-th part
of G / W. The last step of a run is filled up from the next pass, so no step is short.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from olora_ray.config import Train
from olora_ray.data.collate import Batch, collate
from olora_ray.data.store import TokenStore, order


@dataclass(frozen=True)
class StepData:
    """One worker's data of one step."""

    micro: tuple[Batch, ...]
    sequences: tuple[tuple[int, ...], ...]
    """Indices in the store, one group a micro-batch."""
    supervised: int
    """Supervised tokens of the global batch, over all workers."""


class Feed:
    """Reads steps of one worker, one step ahead of the training."""

    def __init__(
        self, store: TokenStore, train: Train, seed: int, attention: str, worker: int = 0, workers: int = 1
    ) -> None:
        self.store, self.train, self.seed, self.attention = store, train, seed, attention
        self.worker, self.workers = worker, workers

    def read(self, step: int) -> StepData:
        """The data of global step `step`, counted from 0."""
        size = self.train.global_batch
        sequences = [int(i) for i in order(len(self.store), self.seed, step * size, (step + 1) * size)]
        share = size // self.workers
        own = sequences[self.worker * share : (self.worker + 1) * share]
        width = self.train.micro_batch
        groups = tuple(tuple(own[i : i + width]) for i in range(0, len(own), width))
        return StepData(
            micro=tuple(collate([self.store[i] for i in group], self.attention) for group in groups),
            sequences=groups,
            supervised=self.store.supervised(sequences),
        )

    def steps(self, start: int, stop: int) -> Iterator[tuple[StepData, float]]:
        """Steps start .. stop - 1, each with the seconds that were spent waiting for it."""
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as reader:
            ahead = reader.submit(self.read, start) if start < stop else None
            for step in range(start, stop):
                assert ahead is not None
                began = time.perf_counter()
                data = ahead.result()
                waited = time.perf_counter() - began
                ahead = reader.submit(self.read, step + 1) if step + 1 < stop else None
                yield data, waited


def total_steps(train: Train, packs: int) -> int:
    """Optimizer steps of a run over `packs` sequences."""
    return train.steps or max(1, -(-round(train.epochs * packs) // train.global_batch))
