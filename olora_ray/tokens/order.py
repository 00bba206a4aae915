"""Order in which a training meets the sequences of a store: a function of the seed and the place, without state.

The first pass is the order of the store, which is shuffled. A later one is a permutation: of a store of few shards any
at all, as good as all of its sequences in an urn. Of a store of many, that would open another shard for nearly each
sequence, so its shards are permuted, laid side by side in *windows* of at most WINDOW of them, and the sequences of
each window are permuted among themselves. A reader then has two windows open at most, and opens a shard once a pass.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from olora_ray.tokens import rng

FEW_SHARDS = 512
"""Shards up to which every pass permutes the whole store. This and the next are a part of what a run is repeated by."""
WINDOW = 256
"""Shards of a window, at most."""

Places = NDArray[np.int64]


def order(num_packs: int, seed: int, start: int, stop: int) -> Places:
    """The sequences at places start..stop-1 of the endless order over a store of few shards, (stop - start,).

    Any range costs only its own length.
    """
    epoch, place = np.divmod(np.arange(start, stop, dtype=np.int64), num_packs)
    for number in np.unique(epoch[epoch > 0]):
        inside = epoch == number
        place[inside] = rng.permute_at(place[inside], num_packs, rng.key("order", seed, number))
    return place


@dataclass(frozen=True, eq=False)
class WindowedPass:
    """A later pass over a store of many shards."""

    ends: Places
    """(shards + 1,) sequences before each shard, and in all."""
    seed: int
    number: int
    """Of the pass, from 1."""

    @cached_property
    def shards(self) -> Places:
        """(shards,) in the order of the pass."""
        return rng.permutation(len(self.ends) - 1, rng.key("shards", self.seed, self.number))

    @cached_property
    def starts(self) -> Places:
        """(shards + 1,) places before each of these, and in all."""
        return np.concatenate([[0], np.cumsum(np.diff(self.ends)[self.shards])])

    @cached_property
    def windows(self) -> Places:
        """(windows + 1,) the places at which windows begin, and the end."""
        shards = len(self.shards)
        count = -(-shards // WINDOW)
        return self.starts[np.arange(count + 1) * shards // count]

    def at(self, places: Places) -> Places:
        """The sequences at places of the pass, each below the number of sequences of the store."""
        window = np.searchsorted(self.windows, places, side="right") - 1
        inside = np.empty_like(places)
        for number in np.unique(window).tolist():
            start, end = self.windows[number : number + 2].tolist()
            own = window == number
            key = rng.key("window", self.seed, self.number, number)
            inside[own] = start + rng.permute_at(places[own] - start, end - start, key)
        shard = np.searchsorted(self.starts, inside, side="right") - 1
        return self.ends[self.shards[shard]] + inside - self.starts[shard]
