"""One flat vector behind all adapters, the optimizer on it, and the learning rate."""

import math

import pytest
import torch
from torch import nn

from olora_ray.adapter.layer import AdaptedLinear, Factors
from olora_ray.adapter.optimizers.adamw import AdamW
from olora_ray.adapter.optimizers.optimizer import FlatAdapters
from olora_ray.config.schema import Train
from olora_ray.train.loader import lr_at

SHAPES = {"first": (5, 3), "second": (4, 7)}
RANK = 2


def adapted() -> dict[str, AdaptedLinear]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: AdaptedLinear(
            nn.Linear(n, m),
            Factors(torch.randn(RANK, n, generator=generator), torch.randn(m, RANK)),
            1.0,
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
    groups = [
        {"params": [p for name, p in separate.items() if name.endswith(part)]}
        for part in (".da", ".db")
    ]
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


def moved(fused: bool) -> AdamW:
    """Return an optimizer after a few steps, some of them clipped."""
    config = Train(weight_decay=0.1, lr_ratio=4.0, clip=10.0)
    optimizer = AdamW(FlatAdapters(adapted(), apart=True), config, fused=fused)
    for step in range(6):
        for name, gradient in random_gradients(optimizer.flat, step).items():
            optimizer.flat.view(optimizer.flat.grad, name).copy_(gradient * (step + 1) / 3)
        optimizer.step(0.01)
        if step == 2:  # as from a checkpoint
            optimizer.load({name: value.clone() for name, value in optimizer.state().items()}, 3)
    return optimizer


def test_the_update_in_one_kernel_is_the_plain_one_but_for_rounding() -> None:
    plain, fused = moved(fused=False), moved(fused=True)
    assert fused.inner.defaults["fused"]
    torch.testing.assert_close(fused.flat.vector, plain.flat.vector)
    for name, moment in plain.state().items():
        torch.testing.assert_close(fused.state()[name], moment)


def test_the_middle_of_the_schedules() -> None:
    def middle(schedule: str) -> float:
        return lr_at(60, 100, Train.model_validate({"schedule": schedule, "warmup": 0.2}), 0.1)

    assert middle("linear") == pytest.approx(0.05)
    assert middle("cosine") == pytest.approx(0.05)
    assert lr_at(40, 100, Train(warmup=0.2), 0.1) == pytest.approx(
        0.05 * (1 + math.cos(math.pi / 4))
    )
