"""Each method's factors have the properties that the method promises."""

from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.methods import METHODS, lora, olora
from olora_ray.config.schema import Adapter

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def random_weight(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_orthonormal(b0: torch.Tensor) -> None:
    assert torch.isfinite(b0).all()
    torch.testing.assert_close(b0.T @ b0, torch.eye(b0.shape[1], dtype=b0.dtype), atol=1e-5, rtol=0)


def test_every_method_of_the_config_exists() -> None:
    assert set(METHODS) == set(get_args(Adapter.model_fields["method"].annotation))


@given(sizes, sizes, st.data(), seeds)
def test_the_short_qr_gives_the_factors_of_the_full_one(m: int, n: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight = random_weight(m, n, seed, torch.float64)
    assume(torch.linalg.cond(weight[:, :rank]) < 1e6)
    q, r = torch.linalg.qr(weight)
    found = olora.factors(weight, rank, seed=0)
    assert found.b0 is not None
    torch.testing.assert_close(found.b0, q[:, :rank], atol=1e-8, rtol=0)
    torch.testing.assert_close(found.a0, r[:rank], atol=1e-8, rtol=1e-8)
    assert found.full_rank


@given(sizes, sizes, st.data(), seeds)
def test_b0_is_orthonormal_and_a0_is_its_projection(m: int, n: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight = random_weight(m, n, seed)
    found = olora.factors(weight, rank, 0)
    assert found.b0 is not None
    assert found.b0.shape == (m, rank)
    assert found.a0.shape == (rank, n)
    assert_orthonormal(found.b0)
    torch.testing.assert_close(found.a0, found.b0.T @ weight)


def _zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight)


def _zero_slice(weight: torch.Tensor) -> torch.Tensor:
    weight[:, :4] = 0
    return weight


def _zero_column(weight: torch.Tensor) -> torch.Tensor:
    weight[:, 2] = 0
    return weight


def _twin_columns(weight: torch.Tensor) -> torch.Tensor:
    weight[:, 3] = 2 * weight[:, 1]
    return weight


def _one_direction(weight: torch.Tensor) -> torch.Tensor:
    return weight[:, :1] @ weight[:1]


@pytest.mark.parametrize("damage", [_zeros, _zero_slice, _zero_column, _twin_columns, _one_direction])
def test_a_rank_deficient_slice_is_flagged_and_completed(damage: object) -> None:
    assert callable(damage)
    weight = damage(random_weight(24, 16))
    found = olora.factors(weight, 4, 0)
    assert not found.full_rank
    assert found.b0 is not None
    assert_orthonormal(found.b0)
    torch.testing.assert_close(found.a0, found.b0.T @ weight)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_full_rank_does_not_depend_on_the_size_of_the_weight(size: float) -> None:
    assert olora.factors(random_weight(24, 16) * size, 4, 0).full_rank


def test_deficiency_beyond_the_slice_does_not_matter() -> None:
    weight = random_weight(24, 16)
    weight[:, 8:] = 0
    assert olora.factors(weight, 4, 0).full_rank


@given(seeds)
def test_lora_depends_on_the_seed_alone(seed: int) -> None:
    ambient = torch.random.get_rng_state()
    one = lora.factors(random_weight(12, 8, seed=1), 4, seed)
    two = lora.factors(random_weight(20, 8, seed=2), 4, seed)
    assert torch.equal(one.a0, two.a0)
    assert not torch.equal(one.a0, lora.factors(random_weight(12, 8), 4, seed + 1).a0)
    assert torch.equal(ambient, torch.random.get_rng_state())


def test_lora_starts_as_torch_initialises_a_linear_layer_with_b_at_zero() -> None:
    found = lora.factors(random_weight(12, 400), 8, 0)
    assert found.b0 is None
    assert found.a0.abs().max() <= 400**-0.5
    assert abs(float(found.a0.std()) * (3 * 400) ** 0.5 - 1) < 0.05
    change = AdapterWeights(found, torch.zeros(8, 400), torch.zeros(12, 8)).delta(2.0)
    assert not change.any()


def test_one_rank_deficient_expert_makes_a_stack_deficient() -> None:
    stack = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    assert olora.factors(stack, 4, 0).full_rank
    stack[1] *= 1e-6
    assert olora.factors(stack, 4, 0).full_rank, "an expert's size is measured by its own"
    stack[1, :, 2] = 0
    assert not olora.factors(stack, 4, 0).full_rank


@given(st.integers(2, 4), seeds)
def test_the_change_of_a_stack_is_that_of_each_expert(experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = olora.factors(torch.randn(experts, 9, 7, generator=generator), 3, 0)
    da, db = torch.randn(experts, 3, 7, generator=generator), torch.randn(experts, 9, 3, generator=generator)
    whole = AdapterWeights(start, da, db)
    lora_a, lora_b = whole.plain_lora()
    for expert in range(experts):
        assert start.b0 is not None
        one = AdapterWeights(Factors(start.a0[expert], start.b0[expert]), da[expert], db[expert])
        torch.testing.assert_close(whole.delta(1.5)[expert], one.delta(1.5))
        assert torch.equal(lora_a[expert], one.plain_lora()[0])
        assert torch.equal(lora_b[expert], one.plain_lora()[1])
