"""One flat vector behind all adapters, the optimizer over it, and the preconditioner of its gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from olora_ray.adapter.layer import AdaptedLinear, AdaptedWeight, Factors
from olora_ray.config.schema import Train
from olora_ray.train.optim import AdamW, FlatAdapters, precondition
from tests import tiny

SHAPES = {"first": (5, 3), "second": (4, 7)}
RANK = 2


def adapted() -> dict[str, AdaptedLinear]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: AdaptedLinear(
            nn.Linear(n, m), Factors(torch.randn(RANK, n, generator=generator), torch.randn(m, RANK)), 1.0
        )
        for name, (m, n) in SHAPES.items()
    }


def random_gradients(flat: FlatAdapters, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(slot.shape, generator=generator) for name, slot in flat.slots.items()}


def flat_for(config: Train) -> FlatAdapters:
    return FlatAdapters(adapted(), apart=config.lr_ratio != 1)


@pytest.mark.parametrize("ratio", [1.0, 16.0, 0.25])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torchs_on_separate_tensors(decay: float, ratio: float) -> None:
    config = Train(weight_decay=decay, clip=None, lr=0.01, lr_ratio=ratio)
    flat = flat_for(config)
    ours = AdamW(flat, config)
    separate = {name: nn.Parameter(slot.detach().clone()) for name, slot in flat.slots.items()}
    groups = [{"params": [p for name, p in separate.items() if name.endswith(part)]} for part in (".da", ".db")]
    theirs = torch.optim.AdamW(groups, lr=0.01, weight_decay=decay)
    for step in range(4):
        for group, factor in zip(theirs.param_groups, (1.0, ratio), strict=True):
            group["lr"] = factor * 0.01 / (step + 1)
        for name, gradient in random_gradients(flat, step).items():
            separate[name].grad = gradient
            flat.view(flat.grad, name).copy_(gradient)
        theirs.step()
        ours.step(0.01 / (step + 1))
        for name, parameter in separate.items():
            torch.testing.assert_close(flat.slots[name].detach(), parameter.detach())


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_clipping_is_that_of_torch_and_reports_the_norm_before(size: float) -> None:
    flat = FlatAdapters(adapted())
    separate = []
    for name, gradient in random_gradients(flat, 1).items():
        flat.view(flat.grad, name).copy_(gradient * size)
        separate.append(nn.Parameter(torch.zeros_like(gradient)))
        separate[-1].grad = gradient * size
    optimizer = AdamW(flat, Train(clip=1.0))
    seen = []
    optimizer.inner.register_step_pre_hook(lambda *_: seen.append(flat.grad.clone()))
    norm = optimizer.step(0.0)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(separate, 1.0)))
    clipped = torch.cat([part.grad.reshape(-1) for part in separate if part.grad is not None])
    torch.testing.assert_close(seen[0], clipped)


@pytest.mark.parametrize("config", [Train(), Train(lr_ratio=4.0)], ids=["one rate", "two rates"])
def test_the_state_comes_back_exactly(config: Train) -> None:
    def run(optimizer: AdamW, steps: range) -> None:
        for step in steps:
            for name, gradient in random_gradients(optimizer.flat, step).items():
                optimizer.flat.view(optimizer.flat.grad, name).copy_(gradient)
            optimizer.step(0.01)

    whole = AdamW(flat_for(config), config)
    run(whole, range(6))
    first = AdamW(flat_for(config), config)
    run(first, range(3))
    second = AdamW(flat_for(config), config)
    second.flat.vector.copy_(first.flat.vector)
    second.load({name: value.clone() for name, value in first.state().items()}, 3)
    run(second, range(3, 6))
    assert torch.equal(second.flat.vector, whole.flat.vector)
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())
    assert whole.state().keys() == AdamW(FlatAdapters(adapted()), Train()).state().keys()


def moved(device: str) -> tuple[AdamW, list[float]]:
    """An optimizer after a few steps on a device, some of them clipped, and the norms."""
    layers = {name: layer.to(device) for name, layer in adapted().items()}
    config = Train(weight_decay=0.1, lr_ratio=4.0, clip=10.0)
    optimizer = AdamW(FlatAdapters(layers, apart=True), config)
    norms = []
    for step in range(6):
        for name, gradient in random_gradients(optimizer.flat, step).items():
            optimizer.flat.view(optimizer.flat.grad, name).copy_(gradient * (step + 1) / 3)
        norms.append(optimizer.step(0.01))
        if step == 2:  # as from a checkpoint
            optimizer.load({name: value.clone() for name, value in optimizer.state().items()}, 3)
    return optimizer, norms


def test_cpus_have_the_plain_update() -> None:
    optimizer, norms = moved("cpu")
    assert min(norms) < 10.0 < max(norms)
    assert optimizer.inner.defaults["fused"] is None
    assert {float(state["step"]) for state in optimizer.inner.state.values()} == {6.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_updates_in_one_kernel_and_is_not_waited_for() -> None:
    plain, norms = moved("cpu")
    fused, found = moved("cuda")
    assert fused.inner.defaults["fused"]
    assert found == pytest.approx(norms)
    torch.testing.assert_close(fused.flat.vector.cpu(), plain.flat.vector)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.step(0.01, norms[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


M, N = 9, 6


def adapter(with_b0: bool, *experts: int, seed: int = 0) -> AdaptedWeight:
    """A layer, or a stack, as if it had trained for a while."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*experts, *shape, generator=generator)

    layer = AdaptedWeight(Factors(draw(RANK, N), draw(M, RANK) if with_b0 else None), M, 1.0)
    layer.da.data, layer.db.data = draw(RANK, N), draw(M, RANK)
    layer.da.grad, layer.db.grad = draw(RANK, N), draw(M, RANK)
    return layer


def formula(layer: AdaptedWeight) -> tuple[Tensor, Tensor]:
    a, b = layer.a0 + layer.da, layer.db if layer.b0 is None else layer.b0 + layer.db
    assert layer.da.grad is not None
    assert layer.db.grad is not None
    eye = 1e-6 * torch.eye(RANK, dtype=torch.float64)
    a, b = a.detach().double(), b.detach().double()
    grad_a = torch.linalg.inv(b.mT @ b + eye) @ layer.da.grad.double()
    grad_b = layer.db.grad.double() @ torch.linalg.inv(a @ a.mT + eye)
    return tuple(g / torch.linalg.matrix_norm(g, keepdim=True) for g in (grad_a, grad_b))  # type: ignore[return-value]


@pytest.mark.parametrize(("with_b0", "experts"), [(True, ()), (False, ()), (True, (4,))])
@given(seed=st.integers(0, 2**31))
def test_a_layer_or_each_expert_of_a_stack_has_the_formula(with_b0: bool, experts: tuple[int, ...], seed: int) -> None:
    layer = adapter(with_b0, *experts, seed=seed)
    for found, expected in zip(applied(layer), formula(adapter(with_b0, *experts, seed=seed)), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def applied(layer: AdaptedWeight) -> tuple[Tensor, Tensor]:
    precondition({"layer": layer})
    assert layer.da.grad is not None
    assert layer.db.grad is not None
    return layer.da.grad, layer.db.grad


def test_at_a_start_with_b_zero_the_gradient_of_a_stays_zero() -> None:
    layer = adapter(False)
    assert layer.da.grad is not None
    layer.db.data.zero_()
    layer.da.grad.zero_()
    grad_a, grad_b = applied(layer)
    assert not grad_a.any()
    assert float(grad_b.norm()) == pytest.approx(1.0)


def test_what_is_not_finite_stays_visible() -> None:
    layer = adapter(True)
    assert layer.db.grad is not None
    layer.db.grad[0, 0] = torch.inf
    assert not torch.isfinite(applied(layer)[1]).all()


def _trained(strategy: str, workers: int, **changes: Any) -> tuple[list[float], Tensor, Tensor]:
    """Losses, the vector that the optimizer is given in the last step, and the adapter after it."""
    settings = tiny.config(
        cluster__workers=workers, cluster__strategy=strategy, train__micro_batch=1, train__precondition=True, **changes
    )
    trainer = tiny.trainer(settings, model=tiny.llama(attention="segments"), strategy=strategy)
    gradients = tiny.gradients(trainer)
    losses = [result.loss for result in tiny.steps(trainer, count=3)]
    return losses, gradients[-1], trainer.flat.vector


def test_it_is_done_before_clipping() -> None:
    _, given_to_adamw, _ = _trained("ddp", 1, train__clip=0.5)
    assert float(given_to_adamw.norm()) == pytest.approx(0.5, rel=1e-4)
    _, given_to_adamw, _ = _trained("ddp", 1, train__clip=None)
    matrices = 2 * len(tiny.trainer(tiny.config()).adapted)
    assert float(given_to_adamw.norm()) == pytest.approx(matrices**0.5, rel=1e-4)
