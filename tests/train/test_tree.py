"""The order of the sum over a step's micro-batches does not depend on the workers."""

import socket
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olora_ray.common import collectives
from olora_ray.train import tree
from olora_ray.train.tree import TreeSum
from tests.crew import Crew, Crews

some_leaves = st.integers(1, 70)
some_workers = st.integers(1, 12)


def written(start: int, stop: int) -> str:
    """Return the sum in brackets, by the definition: a node splits at the largest power of two below its leaves."""
    if stop - start == 1:
        return str(start)
    middle = start + 2 ** ((stop - start - 1).bit_length() - 1)
    return f"({written(start, middle)}+{written(middle, stop)})"


def folded(leaves: int, own: range) -> list[tuple[range, str]]:
    return tree.fold(
        [(range(leaf, leaf + 1), str(leaf)) for leaf in own], leaves, lambda a, b: f"({a}+{b})"
    )


@given(some_leaves)
def test_leaves_are_summed_as_the_definition_says(leaves: int) -> None:
    assert folded(leaves, range(leaves)) == [(range(leaves), written(0, leaves))]


@given(some_leaves, some_workers)
def test_the_nodes_of_all_workers_are_summed_to_the_same(leaves: int, workers: int) -> None:
    shares = [collectives.share(leaves, worker, workers) for worker in range(workers)]
    assert [leaf for own in shares for leaf in own] == list(range(leaves))
    parts = [folded(leaves, own) for own in shares]
    assert tree.nodes_of(leaves, workers) == tuple(
        tuple(node for node, _ in part) for part in parts
    )
    every = [pair for part in parts for pair in part]
    assert tree.fold(every, leaves, lambda a, b: f"({a}+{b})") == [
        (range(leaves), written(0, leaves))
    ]


SIZES = (1, 3, 4, 1000)
"""Numbers of a vector: fewer than workers, too."""
LEAVES = (1, 2, 3, 5, 6, 8, 13, 21)


def _summed(size: int, leaves: int) -> Tensor:
    """Return the sum over all workers, twice with the same TreeSum."""
    gradient = TreeSum(torch.full((size,), 7.0))
    results = []
    for _ in range(2):
        add_up(
            gradient,
            leaves,
            collectives.share(leaves, collectives.rank(), collectives.world_size()),
        )
        gradient.finish()
        results.append(gradient.whole.clone())
    assert torch.equal(*results)
    return results[0]


def value(leaf: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(leaf))


def _all_sums(each: int) -> list[Tensor]:
    """Return all sums of workers that share their machines with so many others."""
    with mock.patch.object(
        socket, "gethostname", return_value=f"machine {collectives.rank() // each}"
    ):
        return [_summed(size, leaves) for size in SIZES for leaves in LEAVES]


@pytest.mark.parametrize(
    ("workers", "each"),
    [(1, 1), (2, 2), (3, 3), (2, 1), (5, 2)]
    + [pytest.param(*more, marks=pytest.mark.slow) for more in ((5, 5), (4, 2), (6, 3))],
)
def test_vectors_of_all_workers_are_summed_in_the_trees_order_on_any_machines(
    crew: Crews, workers: int, each: int
) -> None:
    own = Crew(workers) if workers > 3 else None  # others need no such group
    try:
        found = (own or crew(workers)).run(_all_sums, each)
    finally:
        if own:
            own.close()
    cases = [(size, leaves) for size in SIZES for leaves in LEAVES]
    for results in found:
        for (size, leaves), result in zip(cases, results, strict=True):
            wanted = tree.total(torch.stack([value(leaf, size) for leaf in range(leaves)]))
            assert torch.equal(result, wanted), (size, leaves)


def sent(leaves: int, machines: tuple[range, ...]) -> float:
    """Return how many vectors all workers of the first machine together send to other machines in a step."""
    total = 0.0
    for here in machines[0]:
        share = 1.0  # of the vector that the workers of this level sum
        for level in tree.levels(leaves, machines, here):
            share /= len(level.nodes)
            away = len(level.nodes) - len(
                [worker for worker in level.nodes if worker in machines[0]]
            )
            total += share * away * (len(level.nodes[here]) + 1)
    return total


@pytest.mark.parametrize(
    ("leaves", "machines", "vectors"),
    [(16, 2, 1.0), (32, 2, 1.0), (64, 8, 1.75), (16, 1, 0.0), (48, 2, 1.5)],
)
def test_a_machine_sends_one_vector_and_not_one_per_worker(
    leaves: int, machines: int, vectors: float
) -> None:
    """Of 8B at rank 16 a vector has 168 MB; one per worker were 1.3 GB per step."""
    ranks = tuple(range(first, first + 8) for first in range(0, 8 * machines, 8))
    assert sent(leaves, ranks) == pytest.approx(vectors)


def add_up(gradient: TreeSum, leaves: int, own: range) -> None:
    gradient.begin(leaves)
    for leaf in own:
        with gradient.leaf(leaf):
            gradient.whole.add_(value(leaf, len(gradient.whole)))
