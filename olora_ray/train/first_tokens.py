"""The first supervised tokens of a run's order: what data-driven methods look at.

The first pass goes through the token store in its own order, which is shuffled, so that they depend on the store's
digest alone: not on workers, batches or the seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import Waiting, until


@dataclass(frozen=True)
class Piece:
    """A sequence with the supervised tokens of it that are wanted: its first `count`."""

    sequence: int
    """Its number in the store."""
    first: int
    """The place of the first of them among all that are wanted."""
    count: int

    @property
    def end(self) -> int:
        """The place after the last of them."""
        return self.first + self.count


def first_tokens(store: TokenStore, limit: int, waiting: Waiting | None = None) -> list[Piece]:
    """The sequences that have the first `limit` supervised tokens of the store, or all if it has fewer.

    Waits for the shards that it needs; `waiting` as of StepLoader.
    """
    return list(_pieces(store, limit, waiting))


def _pieces(store: TokenStore, limit: int, waiting: Waiting | None) -> Iterator[Piece]:
    place, sequence = 0, 0
    while place < limit:
        until(store, partial(_knows, store, sequence), waiting)
        if sequence >= store.available:
            return
        count = min(store.supervised([sequence]), limit - place)
        if count:
            yield Piece(sequence, place, count)
        place, sequence = place + count, sequence + 1


def _knows(store: TokenStore, sequence: int) -> bool:
    return store.available > sequence or store.total is not None
