"""Compression keeps the best change of its rank, and tells what is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.peft_folder import compress


def adapter(experts: tuple[int, ...], m: int, n: int, rank: int, seed: int, with_start: bool = True) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*experts, *shape, generator=generator)

    return AdapterWeights(Factors(draw(rank, n), draw(m, rank) if with_start else None), draw(rank, n), draw(m, rank))


@given(st.sampled_from([(), (3,)]), st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 9))
def test_it_is_the_best_of_its_rank(experts: tuple[int, ...], m: int, n: int, rank: int, limit: int) -> None:
    layers = {"a": adapter(experts, m, n, rank, 1), "b": adapter(experts, n, m, rank, 2)}
    found, lost = compress(layers, limit)
    wrong = whole = 0.0
    for name, item in layers.items():
        exact = item.delta(0.5).double()
        values = torch.linalg.svdvals(exact)
        gap = found[name].delta(0.5).double() - exact
        best = values[..., limit:].square().sum()
        assert float(gap.square().sum() - best) == pytest.approx(0, abs=1e-6 * float(values.square().sum()))
        wrong, whole = wrong + float(best), whole + float(values.square().sum())
        assert found[name].plain_lora()[0].shape[-2] == min(limit, 2 * rank)
    assert lost == pytest.approx((wrong / whole) ** 0.5, abs=1e-4)


def test_an_adapter_of_a_small_rank_stays_as_it_is() -> None:
    layers = {"a": adapter((), 8, 6, 2, 1, with_start=False)}
    found, lost = compress(layers, 2)
    assert found["a"] is layers["a"]
    assert lost == 0


def test_nothing_changed_is_nothing_lost() -> None:
    start = adapter((), 8, 6, 2, 1)
    still = AdapterWeights(start.factors, torch.zeros_like(start.da), torch.zeros_like(start.db))
    found, lost = compress({"a": still}, 1)
    assert lost == 0
    assert not found["a"].delta(1.0).any()
