"""The preconditioner equals its formula, and PEFT's except for the division by the norm, on all workers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight, Factors
from olora_ray.adapter.optimizers.preconditioned import precondition
from tests import tiny

M, N, RANK = 9, 6, 3


def adapter(with_b0: bool, *experts: int, seed: int = 0) -> AdaptedWeight:
    """Return a layer, or a stack, as if it had trained for a while."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*experts, *shape, generator=generator)

    layer = AdaptedWeight(Factors(draw(RANK, N), draw(M, RANK) if with_b0 else None), M, 1.0)
    layer.da.data, layer.db.data = draw(RANK, N), draw(M, RANK)
    layer.da.grad, layer.db.grad = draw(RANK, N), draw(M, RANK)
    return layer


def formula(layer: AdaptedWeight) -> tuple[Tensor, Tensor]:
    a, b = layer.a0 + layer.da, layer.db if layer.b0 is None else layer.b0 + layer.db
    eye = 1e-6 * torch.eye(RANK, dtype=torch.float64)
    a, b = a.detach().double(), b.detach().double()
    grad_a = torch.linalg.inv(b.mT @ b + eye) @ layer.da.grad.double()
    grad_b = layer.db.grad.double() @ torch.linalg.inv(a @ a.mT + eye)
    return tuple(g / torch.linalg.matrix_norm(g, keepdim=True) for g in (grad_a, grad_b))  # type: ignore[return-value]


@pytest.mark.parametrize(("with_b0", "experts"), [(True, ()), (False, ()), (True, (4,))])
@given(seed=st.integers(0, 2**31))
def test_a_layer_has_the_formula_and_a_stack_that_of_each_expert(
    with_b0: bool, experts: tuple[int, ...], seed: int
) -> None:
    layer = adapter(with_b0, *experts, seed=seed)
    wanted = formula(layer)
    for found, expected in zip(applied(layer), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def applied(layer: AdaptedWeight) -> tuple[Tensor, Tensor]:
    precondition({"layer": layer})
    return layer.da.grad, layer.db.grad


def test_at_a_start_with_b_zero_the_gradient_of_a_stays_zero() -> None:
    layer = adapter(False)
    layer.db.data.zero_()
    layer.da.grad.zero_()
    grad_a, grad_b = applied(layer)
    assert not grad_a.any()
    assert float(grad_b.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("clip", [0.5, None])
def test_it_is_done_before_clipping(clip: float | None) -> None:
    trainer = tiny.trainer(tiny.decided(train__optimizer="preconditioned", train__clip=clip))
    given_to_adamw = tiny.gradients(trainer)
    list(tiny.steps(trainer, count=3))
    matrices = 2 * len(trainer.adapted)
    assert float(given_to_adamw[-1].norm()) == pytest.approx(clip or matrices**0.5, rel=1e-4)
