"""Gradients of a step's micro-batches, summed in one fixed order, whichever worker has computed which of them.

Sums of floating-point numbers depend on their order. Here the M micro-batches (leaves) of a step are always summed
along the same binary tree, which depends on M alone: neighbours in pairs, level by level; an odd one goes up alone.

    0     1     2     3     4     5     6       M = 7
    +--+--+     +--+--+     +--+--+     |
     [0, 2)      [2, 4)      [4, 6)     |       [start, stop): the leaves that are summed here
       +-----+-----+           +---+----+
          [0, 4)                [4, 7)
             +-----------+---------+
                      [0, 7)

So a node of n leaves is the sum of two, of which the left has the largest power of two below n. A worker has the leaves
of a share, side by side; within it whole nodes are summed as soon as both parts are there, like the carries of a binary
counter. What is left are the nodes whose other part is elsewhere: with workers as many as a power of two, and as many
leaves each, one. These are exchanged: each worker gets a slice of the vector of all nodes, adds them in the tree's
order, and sends the sum of its slice to all others. With one node a worker, as many bytes travel as in a ring
all-reduce. All of it is in float32.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from olora_ray.common import collectives

Value = TypeVar("Value")


def joined(left: range, right: range, leaves: int) -> range | None:
    """The node of a tree over `leaves` that is the sum of two neighbours; None if they belong to different ones."""
    size = len(left)
    stop = min(left.start + 2 * size, leaves)
    whole = left.start % (2 * size) == 0 and left.stop == right.start and right.stop == stop
    return range(left.start, stop) if whole else None


def fold(
    parts: Iterable[tuple[range, Value]], leaves: int, add: Callable[[Value, Value], Value]
) -> list[tuple[range, Value]]:
    """Neighbouring nodes, summed as far as the tree allows."""
    found: list[tuple[range, Value]] = []
    for node, value in parts:
        while found and (whole := joined(found[-1][0], node, leaves)):
            node, value = whole, add(found.pop()[1], value)
        found.append((node, value))
    return found


@lru_cache(maxsize=64)
def nodes_of(leaves: int, workers: int) -> tuple[tuple[range, ...], ...]:
    """The nodes that each worker has summed up when it is done with its share."""
    shares = (collectives.share(leaves, worker, workers) for worker in range(workers))
    return tuple(
        tuple(node for node, _ in fold(((range(leaf, leaf + 1), None) for leaf in own), leaves, lambda *_: None))
        for own in shares
    )


def total(values: Tensor) -> Tensor:
    """The sum over the first dimension (leaves) in the tree's order."""
    while len(values) > 1:
        paired = len(values) // 2 * 2
        values = torch.cat([values[:paired:2] + values[1:paired:2], values[paired:]])
    return values[0]


class TreeSum:
    """Sums what is written into the vector `whole` for one leaf after the other; at the end it holds the sum of all.

    Beside `whole` it holds a vector of its size for each earlier node that is not yet a part of another, and in the
    exchange one more (`most_held` counts them). They are kept for the next step.
    """

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.leaves = whole, 0
        self._nodes: list[tuple[range, Tensor]] = []
        """The sums so far; the last lies in `whole`, the others in vectors of their own."""
        self._spare: list[Tensor] = []

    def begin(self, leaves: int) -> None:
        """Begin a sum over so many leaves; what was left of another, whose exchange has failed, is forgotten."""
        self._spare += [vector for _, vector in self._nodes[:-1]]
        self.leaves, self._nodes = leaves, []

    @contextmanager
    def leaf(self, number: int) -> Iterator[None]:
        """While it is entered, `whole` is for this leaf alone, and zero at first."""
        if self._nodes:  # make room in `whole`
            node, _ = self._nodes[-1]
            kept = self._spare.pop() if self._spare else torch.empty_like(self.whole)
            self._nodes[-1] = (node, kept.copy_(self.whole))
        self.whole.zero_()
        yield
        self._nodes = fold([*self._nodes, (range(number, number + 1), self.whole)], self.leaves, self._add)

    def finish(self) -> None:
        """Exchange what all workers have: `whole` is the sum over all leaves. All workers must call it together."""
        everyone, here = nodes_of(self.leaves, collectives.world_size()), collectives.rank()
        assert tuple(node for node, _ in self._nodes) == everyone[here]
        if len(everyone) > 1:
            self._exchange(everyone, here)
        self.begin(0)

    def _add(self, left: Tensor, right: Tensor) -> Tensor:
        """The sum in `right`, which is `whole`: the last node stays there."""
        self._spare.append(left)
        return right.add_(left)

    def _exchange(self, everyone: Sequence[Sequence[range]], here: int) -> None:
        """Add up slices and gather the sums; in so many rounds that what is received has room in one vector more."""
        workers = len(everyone)
        count = workers * -(-sum(map(len, everyone)) // workers)
        cuts = [place * self.whole.numel() // count for place in range(count + 1)]
        slices = [slice(*pair) for pair in itertools.pairwise(cuts)]
        for first in range(0, count, workers):
            self._exchange_slices(everyone, here, slices[first : first + workers])

    def _exchange_slices(self, everyone: Sequence[Sequence[range]], here: int, slices: Sequence[slice]) -> None:
        """One slice for each worker to add up."""
        mine, others = self.whole[slices[here]], [worker for worker in range(len(slices)) if worker != here]
        parts = [
            [vector[slices[here]] for _, vector in self._nodes] if worker == here else list(map(mine.new_empty, sizes))
            for worker, sizes in enumerate([[len(mine)] * len(nodes) for nodes in everyone])
        ]
        collectives.transfer(
            [(worker, vector[slices[worker]]) for worker in others for _, vector in self._nodes],
            [(worker, part) for worker in others for part in parts[worker]],
        )
        nodes, values = itertools.chain(*everyone), itertools.chain(*parts)
        ((_, found),) = fold(zip(nodes, values, strict=True), self.leaves, Tensor.add_)
        mine.copy_(found)
        collectives.transfer(
            [(worker, mine) for worker in others], [(worker, self.whole[slices[worker]]) for worker in others]
        )


def most_held(leaves: int, workers: int) -> int:
    """Vectors beside its `whole` that the TreeSum of some worker holds at most, the exchange included.

    3 or less for up to 5 leaves a worker; for n leaves about log2 n where shares are nodes, and else twice that.
    """
    return max(_held(collectives.share(leaves, worker, workers), leaves, workers > 1) for worker in range(workers))


def _held(own: range, leaves: int, exchanged: bool) -> int:
    most, found = 0, list[tuple[range, None]]()
    for leaf in own:
        most = max(most, len(found))  # they are set aside for this leaf
        found = fold([*found, (range(leaf, leaf + 1), None)], leaves, lambda *_: None)
    return max(most, max(len(found) - 1, 0) + exchanged)
