"""Sum of the gradients of a step's micro-batches, in one order that does not depend on the workers.

Sums of floating-point numbers depend on their order. Here the M micro-batches (leaves) of a step are always summed
along the same binary tree, which depends on M alone: neighbours in pairs, level by level; an odd node goes up alone.

    0     1     2     3     4     5     6       M = 7
    +--+--+     +--+--+     +--+--+     |
     [0, 2)      [2, 4)      [4, 6)     |       [start, stop): the leaves that are summed here
       +-----+-----+           +---+----+
          [0, 4)                [4, 7)
             +-----------+---------+
                      [0, 7)

So a node of n leaves is the sum of two nodes, of which the left has the largest power of two below n leaves. A worker
computes adjacent leaves. It adds two nodes as soon as it has both, like the carries of a binary counter. The nodes that
remain need a node of another worker. If all workers have the same power of two of leaves, one node per worker remains.
The remaining nodes are exchanged: each worker gets its slice of the vectors of all nodes, adds the slices in the tree's
order, and sends the sum to all others. With one node per worker, as many bytes travel as in a ring all-reduce. Where
several machines have as many workers each, this is done inside each machine first, and then, with the nodes that
remain there, between the workers that have the same slice: each machine sends a vector once, not once per worker.
Everything is in float32.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from olora_ray.common import collectives

Value = TypeVar("Value")


def joined(left: range, right: range, leaves: int) -> range | None:
    """Return the node of a tree over `leaves` that is the sum of two nodes; None if the tree does not add them."""
    size = len(left)
    stop = min(left.start + 2 * size, leaves)
    siblings = left.start % (2 * size) == 0 and left.stop == right.start and right.stop == stop
    return range(left.start, stop) if siblings else None


def fold(
    parts: Iterable[tuple[range, Value]], leaves: int, add: Callable[[Value, Value], Value]
) -> list[tuple[range, Value]]:
    """Add neighbouring nodes as far as the tree allows; return the nodes that remain."""
    nodes: list[tuple[range, Value]] = []
    for node, value in parts:
        while nodes and (parent := joined(nodes[-1][0], node, leaves)):
            node = parent
            value = add(nodes.pop()[1], value)
        nodes.append((node, value))
    return nodes


def remaining(nodes: Iterable[range], leaves: int) -> tuple[range, ...]:
    """Return the nodes that remain when neighbours are added as far as the tree allows."""
    parts = ((node, None) for node in nodes)
    return tuple(node for node, _ in fold(parts, leaves, lambda *_: None))


@lru_cache(maxsize=64)
def nodes_of(leaves: int, workers: int) -> tuple[tuple[range, ...], ...]:
    """Return the nodes that remain on each worker when it has added all of its leaves."""
    singles = [range(leaf, leaf + 1) for leaf in range(leaves)]
    shares = [collectives.share(leaves, worker, workers) for worker in range(workers)]
    return tuple(remaining(singles[own.start : own.stop], leaves) for own in shares)


@dataclass(frozen=True)
class Level:
    """An exchange between some workers, in which each of them sums its slices of their nodes."""

    nodes: Mapping[int, Sequence[range]]
    """Worker -> its nodes, in the order of their leaves."""
    most: int
    """The largest number of nodes in an exchange of this level, of all machines."""

    def rounds(self, size: int) -> Iterator[dict[int, slice]]:
        """Yield the slices of a vector of `size` numbers, by worker."""
        # There are as many rounds as needed for the received slices to fit into the memory of one more vector.
        workers = list(self.nodes)
        count = len(workers) * -(-self.most // len(workers))
        cuts = [index * size // count for index in range(count + 1)]
        slices = itertools.starmap(slice, itertools.pairwise(cuts))
        for _ in range(count // len(workers)):
            yield dict(zip(workers, slices, strict=False))


@lru_cache(maxsize=64)
def levels(leaves: int, machines: tuple[range, ...], here: int) -> tuple[Level, ...]:
    """Return the exchanges in which worker `here` takes part: inside its machine, then between the machines.

    `machines` are the ranks of each machine. One exchange of all workers, if machines differ in their number.
    """
    everyone = nodes_of(leaves, sum(map(len, machines)))
    each = len(machines[0])
    if each == 1 or len(machines) == 1 or any(len(ranks) != each for ranks in machines):
        return (Level(dict(enumerate(everyone)), sum(map(len, everyone))),)
    inside = []
    between = {}
    most = 0
    for ranks in machines:
        own = {rank: everyone[rank] for rank in ranks}
        inside.append(own)
        before = [*itertools.chain.from_iterable(own.values())]
        most = max(most, len(before))
        between[ranks[here % each]] = remaining(before, leaves)
    return (
        Level(inside[here // each], most),
        Level(between, sum(map(len, between.values()))),
    )


def total(values: Tensor) -> Tensor:
    """Return the sum over the first dimension (leaves) in the tree's order."""
    while len(values) > 1:
        paired = len(values) // 2 * 2
        values = torch.cat([values[:paired:2] + values[1:paired:2], values[paired:]])
    return values[0]


class TreeSum:
    """Sum of the vectors that are written into `whole` for one leaf after the other; at the end `whole` has the sum.

    All workers must create theirs together.

    Beside `whole` it holds a vector of the same size for each earlier node that is not added yet, and one more in the
    exchange (`most_held` counts them). The vectors are kept for the next step.
    """

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.leaves = 0
        self._machines = collectives.machines()  # once: an exchange of objects would delay a step
        self._nodes: list[tuple[range, Tensor]] = []
        """The nodes so far; the last is in `whole`, the others have vectors of their own."""
        self._spare: list[Tensor] = []

    def begin(self, leaves: int) -> None:
        # Nodes of an earlier sum are left if its exchange failed. Their vectors are used again.
        self._spare += [vector for _, vector in self._nodes[:-1]]
        self.leaves = leaves
        self._nodes = []

    @contextmanager
    def leaf(self, number: int) -> Iterator[None]:
        """Zero `whole` for the gradient of leaf `number`, and add it to the sum at the end of the `with` block."""
        if self._nodes:  # the last node is in `whole`, so it moves to a vector of its own
            node, _ = self._nodes[-1]
            kept = self._spare.pop() if self._spare else torch.empty_like(self.whole)
            self._nodes[-1] = (node, kept.copy_(self.whole))
        self.whole.zero_()
        yield
        nodes = [*self._nodes, (range(number, number + 1), self.whole)]
        self._nodes = fold(nodes, self.leaves, self._add)

    def finish(self) -> None:
        """Exchange nodes, so that `whole` is the sum over all leaves; all workers must call it together."""
        everyone = nodes_of(self.leaves, collectives.world_size())
        here = collectives.rank()
        assert tuple(node for node, _ in self._nodes) == everyone[here]
        if len(everyone) > 1:
            self._exchange(levels(self.leaves, self._machines, here), here, self._nodes, self.whole)
        self.begin(0)

    def _add(self, left: Tensor, right: Tensor) -> Tensor:
        # The sum goes into `right`, because the last node must be in `whole`.
        self._spare.append(left)
        return right.add_(left)

    def _exchange(
        self, levels: Sequence[Level], here: int, own: Sequence[tuple[range, Tensor]], whole: Tensor
    ) -> None:
        """Write the sum into `whole`; `own` are this worker's nodes of it, which are overwritten."""
        level = levels[0]
        for slices in level.rounds(whole.numel()):
            mine = slices[here]
            parts = {}
            sent = []
            received = []
            for worker, nodes_there in level.nodes.items():
                if worker == here:
                    parts[worker] = [vector[mine] for _, vector in own]
                else:
                    parts[worker] = [torch.empty_like(whole[mine]) for _ in nodes_there]
                    sent += [(worker, vector[slices[worker]]) for _, vector in own]
                    received += [(worker, part) for part in parts[worker]]
            collectives.transfer(sent, received)
            nodes = itertools.chain(*level.nodes.values())
            values = itertools.chain(*parts.values())
            left = fold(zip(nodes, values, strict=True), self.leaves, Tensor.add_)
            if len(levels) > 1:
                self._exchange(levels[1:], here, left, whole[mine])
            else:
                whole[mine].copy_(left[0][1])
            others = [worker for worker in parts if worker != here]
            collectives.transfer(
                [(worker, whole[mine]) for worker in others],
                [(worker, whole[slices[worker]]) for worker in others],
            )


def most_held(leaves: int, workers: int) -> int:
    """Return the largest number of vectors beside `whole` that the TreeSum of a worker holds, the exchange included.

    At most 3 for up to 5 leaves per worker. For n leaves per worker about log2 n if the leaves of each worker are one
    node, otherwise twice as many.
    """
    most = 0
    for worker in range(workers):
        nodes: tuple[range, ...] = ()
        for leaf in collectives.share(leaves, worker, workers):
            # While this leaf is in `whole`, all earlier nodes have vectors of their own.
            most = max(most, len(nodes))
            nodes = remaining([*nodes, range(leaf, leaf + 1)], leaves)
        exchanged = workers > 1
        most = max(most, max(len(nodes) - 1, 0) + exchanged)
    return most
