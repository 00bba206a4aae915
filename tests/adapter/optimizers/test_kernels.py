"""Kernels of an optimizer step on a GPU: few at any rank and any number of layers, without a wait for their results."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from olora_ray.adapter.layer import AdaptedWeight, Factors
from olora_ray.adapter.optimizers.optimizer import FlatAdapters, optimizer_named
from olora_ray.adapter.optimizers.preconditioned import precondition
from olora_ray.adapter.optimizers.spectral import Spectral
from olora_ray.config.schema import Train
from olora_ray.train.price import Kernels

MOST = 300
ONE_BY_ONE = {"cholesky_solve", "cholesky_inverse"}
"""Operators that take one matrix after the other on a GPU."""
LLAMAS = {"135M": (30, 576, 192, 1536), "1B": (16, 2048, 512, 8192), "8B": (32, 4096, 1024, 14336)}
"""Layers, hidden size, size of keys and values, size of the MLP."""


def layers(
    count: int, hidden: int, keys: int, mlp: int, rank: int, draw: Any = torch.empty
) -> dict[str, AdaptedWeight]:
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    shapes += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
    return {
        f"{layer}.{number}": AdaptedWeight(Factors(draw(rank, n), draw(m, rank)), m, 1.0)
        for layer in range(count)
        for number, (m, n) in enumerate(shapes)
    }


def sizes(adapted: dict[str, AdaptedWeight]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(layer.a0.shape[:-2] or (1,)) for name, layer in adapted.items()}


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("name", LLAMAS)
def test_a_step_has_few_kernels_at_any_rank(name: str, rank: int) -> None:
    with torch.device("meta"):
        adapted = layers(*LLAMAS[name], rank)
        flat = FlatAdapters(adapted)
        spectral = optimizer_named("spectral").begin(flat, Train(), sizes(adapted))
        with Kernels() as step:
            spectral.step(1e-3, 2.0)
        with Kernels() as prepared:
            precondition(adapted)
    for seen in (step, prepared):
        assert seen.counts.total() <= MOST
        assert not ONE_BY_ONE & seen.counts.keys()


def test_adamw_has_a_few_kernels() -> None:
    # Its fused kernel does not take tensors on the meta device.
    with FakeTensorMode():
        flat = FlatAdapters(layers(*LLAMAS["135M"], 16))
        adamw: Any = optimizer_named("adamw").begin
        update = adamw(flat, Train(), fused=True)
        with Kernels() as seen:
            update.step(1e-3, 2.0)
    assert seen.counts.total() <= 4


@pytest.mark.parametrize("rank", [4, 16])
def test_all_layers_at_once_give_the_same_bits(rank: int) -> None:
    found = []
    for whole in (False, True):
        random = torch.Generator().manual_seed(rank)

        def draw(*shape: int, random: torch.Generator = random) -> torch.Tensor:
            return torch.randn(*shape, generator=random)

        adapted = layers(3, 64, 32, 96, rank, draw)
        adapted["experts"] = AdaptedWeight(Factors(draw(4, rank, 48), draw(4, 40, rank)), 40, 1.0)
        adapted["no b0"] = AdaptedWeight(Factors(draw(rank, 48), None), 40, 1.0)
        flat = FlatAdapters(adapted)
        update = Spectral(flat, Train(), sizes(adapted), whole=whole)
        for _ in range(2):
            flat.grad.normal_(generator=random)
            update.step(0.01)
        flat.grad.normal_(generator=random)
        precondition(adapted, whole=whole)
        found.append((flat.vector, flat.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
