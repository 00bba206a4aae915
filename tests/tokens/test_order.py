import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.tokens import plan
from olora_ray.tokens.manifest import Outline, ShardInfo
from olora_ray.tokens.store import TokenStore, order


@given(st.integers(1, 300), st.integers(0, 2**31 - 1))
def test_each_epoch_is_a_permutation_and_the_first_is_the_stores_order(
    packs: int, seed: int
) -> None:
    stream = order(packs, seed, 0, 4 * packs)
    epochs = stream.reshape(4, packs)
    assert (epochs[0] == np.arange(packs)).all()
    assert (np.sort(epochs, axis=1) == np.arange(packs)).all()


@given(st.integers(1, 50), st.integers(0, 9), st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_any_split_into_ranges_gives_the_same_stream(
    packs: int, seed: int, cuts: list[int]
) -> None:
    borders = [0, *sorted(cuts), 200]
    parts = [order(packs, seed, low, high) for low, high in itertools.pairwise(borders)]
    assert (np.concatenate(parts) == order(packs, seed, 0, 200)).all()


def test_orders_never_change() -> None:
    # A run is repeatable only if a new version keeps the orders.
    assert order(10, 17, 10, 20).tolist() == GOLDEN_ORDER
    assert plan.permutation(8, plan.key("rows", 17, 0)).tolist() == GOLDEN_SHUFFLE


def test_a_store_of_many_shards_has_the_order_of_one_with_few() -> None:
    infos = tuple(ShardInfo(count, count, count, 1, "") for count in [3, 0, 7] * 200)
    store = TokenStore("/nowhere", Outline("0" * 32, len(infos), 8, ("a",)), infos, None)
    assert (store.order(17, 0, 6000) == order(2000, 17, 0, 6000)).all()


GOLDEN_ORDER = [9, 4, 8, 0, 3, 5, 1, 2, 6, 7]
GOLDEN_SHUFFLE = [3, 0, 7, 4, 5, 1, 6, 2]


def test_chosen_is_the_wanted_share_and_depends_on_each_counter_alone() -> None:
    counters = np.arange(100_000)
    drawn = plan.bernoulli_mask(0.05, 7, counters)
    assert abs(drawn.mean() - 0.05) < 0.003
    assert (plan.bernoulli_mask(0.05, 7, counters[500:900]) == drawn[500:900]).all()
    assert plan.bernoulli_mask(1.0, 7, counters).all()
    assert not plan.bernoulli_mask(0.0, 7, counters).any()
