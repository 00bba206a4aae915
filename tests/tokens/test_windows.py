"""Later passes over a store of many shards: exact, repeatable, with few open shards, and random.

Randomness is measured by what a reader of the loss would notice: the position of a sequence, its neighbours, and
whether neighbours in one pass are still neighbours in the next.
"""

import itertools
from collections import OrderedDict
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.tokens import store as orders
from olora_ray.tokens.manifest import Outline, ShardInfo
from olora_ray.tokens.store import FEW_SHARDS, WINDOW, TokenStore, WindowedPass, order
from tests.tokens.test_order import GOLDEN_ORDER

SEED = 17


def store(packs: list[int]) -> TokenStore:
    """A store with so many sequences in each of its shards; its files do not exist."""
    infos = tuple(ShardInfo(count, count, count, 1, "") for count in packs)
    return TokenStore("/nowhere", Outline("0" * 32, len(packs), 8, ("a",)), infos)


# Sequences per shard, for shards of different sizes; shards of bad rows are empty.
PACKS = np.random.default_rng(0).integers(0, 12, 2000)


@cache
def large() -> TokenStore:
    return store(PACKS.tolist())


def pass_of(number: int, seed: int = SEED) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    total = len(large())
    return large().order(seed, number * total, (number + 1) * total)


def shards_of(
    sequences: "np.ndarray[tuple[int], np.dtype[np.int64]]",
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.searchsorted(np.cumsum(PACKS), sequences, side="right")


def test_a_store_of_few_shards_keeps_its_order() -> None:
    # Existing runs resume in the order in which they started.
    few = store([3] * FEW_SHARDS)
    assert not few.windowed
    total = len(few)
    assert (few.order(SEED, 0, 3 * total) == order(total, SEED, 0, 3 * total)).all()
    assert store([10]).order(SEED, 10, 20).tolist() == GOLDEN_ORDER
    many = store([3] * (FEW_SHARDS + 1))
    assert many.windowed
    assert (many.order(SEED, 0, len(many)) == np.arange(len(many))).all()
    assert (
        many.order(SEED, len(many), 2 * len(many))
        != order(len(many), SEED, len(many), 2 * len(many))
    ).any()


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any),
    st.integers(0, 2**31 - 1),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_each_pass_is_a_permutation(packs: list[int], seed: int, window: int, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "WINDOW", window)
        ends = np.cumsum([0, *packs])
        found = WindowedPass(ends, seed, number).at(np.arange(ends[-1]))
    assert sorted(found.tolist()) == list(range(ends[-1]))


@given(st.integers(0, 9), st.lists(st.integers(0, 2000), min_size=1, max_size=8))
def test_any_split_into_ranges_gives_the_same_stream(seed: int, cuts: list[int]) -> None:
    start = 2 * len(large()) - 1000  # the ranges lie in two passes, and in several windows
    borders = [start, *(start + cut for cut in sorted(cuts)), start + 2000]
    parts = [large().order(seed, low, high) for low, high in itertools.pairwise(borders)]
    assert (np.concatenate(parts) == large().order(seed, start, start + 2000)).all()


def test_orders_never_change() -> None:
    # A run is repeatable only if a new version keeps the orders.
    total = len(large())
    assert large().order(SEED, total + 5_000, total + 5_004).tolist() == GOLDEN_FIRST
    assert large().order(SEED, 5 * total - 4, 5 * total).tolist() == GOLDEN_FIFTH


GOLDEN_FIRST = [4672, 7598, 11176, 7501]
GOLDEN_FIFTH = [1547, 2206, 10152, 5636]


def test_few_shards_are_open_at_a_time_and_each_is_opened_once() -> None:
    # The reader keeps two windows, and takes every third sequence, like one of three workers.
    opened, kept = 0, OrderedDict[int, None]()
    for shard in shards_of(pass_of(1))[::3].tolist():
        if shard not in kept:
            opened += 1
            kept[shard] = None
        kept.move_to_end(shard)
        if len(kept) > 2 * WINDOW:
            kept.popitem(last=False)
    assert opened <= large().shard_count
    step = 1000
    shards = shards_of(pass_of(1))
    most = max(len(np.unique(shards[at : at + step])) for at in range(0, len(shards) - step, 97))
    assert most <= 2 * WINDOW
    # The simpler order that windows replace:
    whole = order(len(large()), SEED, len(large()), 2 * len(large()))
    assert len(np.unique(shards_of(whole[:step]))) > 2.5 * WINDOW
