"""The spectral step: its size, its independence of how B A is written, stacks of experts, plain LoRA's B = 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_ray.adapter.candidates import candidates
from olora_ray.adapter.initialise import weight_sizes
from olora_ray.adapter.layer import AdaptedWeight, Factors
from olora_ray.adapter.optimizers.optimizer import FlatAdapters
from olora_ray.adapter.optimizers.spectral import Spectral
from olora_ray.config.schema import Train
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

M, N, RANK, SCALE, LR, SIZE = 12, 9, 3, 2.0, 0.02, 3.0
MOVE = LR * SIZE


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fit:
    """A layer, or a stack of experts, whose loss is the squared distance of B A to a target, with noise."""

    def __init__(self, a0: Tensor, b0: Tensor | None, **changes: Any) -> None:
        self.layer = AdaptedWeight(Factors(a0, b0), M if b0 is None else b0.shape[-2], SCALE)
        self.flat = FlatAdapters({"layer": self.layer}, apart="lr_ratio" in changes)
        sizes = {"layer": torch.full(a0.shape[:-2] or (1,), SIZE)}
        self.optimizer = Spectral(self.flat, Train(**{"clip": None, **changes}), sizes)
        self.count = 0

    def factors(self) -> tuple[Tensor, Tensor]:
        b0 = 0 if self.layer.b0 is None else self.layer.b0
        return (self.layer.a0 + self.layer.da).detach().clone(), (
            b0 + self.layer.db
        ).detach().clone()

    def step(self, *used: int) -> None:
        """A step; only the experts `used` get a gradient, all if there are none."""
        a, b = self.factors()
        shape = (*a.shape[:-2], M, N)
        gradient = b @ a - draw(*shape, seed=1) + 0.5 * draw(*shape, seed=10 + self.count)
        if used:
            gradient *= torch.tensor([float(each in used) for each in range(len(a))])[:, None, None]
        self.push(gradient)
        self.count += 1

    def push(self, gradient: Tensor) -> None:
        """Step along the gradient of B A."""
        a, b = self.factors()
        self.layer.da.grad.copy_(b.mT @ gradient)
        self.layer.db.grad.copy_(gradient @ a.mT)
        self.optimizer.step(LR)

    def product(self, steps: int) -> Tensor:
        for _ in range(steps):
            self.step()
        a, b = self.factors()
        return b @ a


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_each_factor_moves_the_weight_by_the_rate_times_its_size(ratio: float) -> None:
    fit = Fit(
        draw(RANK, N, seed=2), draw(M, RANK, seed=3), **({} if ratio == 1 else {"lr_ratio": ratio})
    )
    for _ in range(4):
        a, b = fit.factors()
        fit.step()
        new_a, new_b = fit.factors()
        moves = [
            SCALE * torch.linalg.svdvals(change) for change in ((new_b - b) @ a, b @ (new_a - a))
        ]
        for move, size in zip(moves, (MOVE * ratio, MOVE), strict=True):
            torch.testing.assert_close(move[:RANK], torch.full((RANK,), size), rtol=1e-3, atol=0)


def test_a_layer_whose_factor_lacks_rank_moves_no_further() -> None:
    rank = 64
    same = draw(1, 96, seed=2) * torch.linspace(1, 2, rank)[:, None]
    fit = Fit(same, draw(48, rank, seed=3))
    fit.push(draw(48, 96, seed=4))
    assert float(
        torch.linalg.matrix_norm(SCALE * fit.layer.db.detach() @ same, 2)
    ) == pytest.approx(MOVE, rel=0.02)


@pytest.mark.parametrize("start", ["full", "zero"])
def test_the_product_does_not_depend_on_how_it_is_written(start: str) -> None:
    a, b = draw(RANK, N, seed=2), draw(M, RANK, seed=3) if start == "full" else None
    other = draw(RANK, RANK, seed=4) + 2 * torch.eye(RANK)
    written = Fit(other @ a, None if b is None else b @ torch.linalg.inv(other))
    torch.testing.assert_close(written.product(6), Fit(a, b).product(6), rtol=1e-3, atol=1e-4)


def test_each_expert_has_the_step_of_a_layer_and_stands_still_without_tokens() -> None:
    a, b = draw(2, RANK, N, seed=2), draw(2, M, RANK, seed=3)
    stack = Fit(a, b)
    stack.step(1)
    assert torch.equal(stack.factors()[0][0], a[0])
    assert torch.equal(stack.factors()[1][0], b[0])
    stack.step(1)
    target, noise = draw(2, M, N, seed=1), [draw(2, M, N, seed=10 + number) for number in range(2)]
    alone = Fit(a[1], b[1])
    for each in noise:
        own_a, own_b = alone.factors()
        alone.push(own_b @ own_a - target[1] + 0.5 * each[1])
    for found, expected in zip(stack.factors(), alone.factors(), strict=True):
        torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("size", [1.0, 0.0])
def test_without_a_gradient_or_a_weight_nothing_moves(size: float) -> None:
    fit = Fit(size * draw(RANK, N, seed=2), draw(M, RANK, seed=3))
    if not size:
        fit.optimizer.sizes["layer"].zero_()
        fit.layer.da.grad.copy_(draw(RANK, N, seed=4))
    before = fit.flat.vector.clone()
    fit.optimizer.step(LR)
    assert torch.equal(fit.flat.vector, before)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, lambda: zoo.make(ALL["mixtral"])])
def test_the_size_of_a_weight_is_its_root_mean_square_singular_value(
    make: Callable[[], Any],
) -> None:
    targets = {
        name: each.target for name, each in candidates(make()).items() if each.refused is None
    }
    for name, size in weight_sizes(targets, torch.device("cpu")).items():
        exact = (
            torch.linalg.svdvals(targets[name].numbers().float())
            .square()
            .mean(-1)
            .sqrt()
            .reshape(-1)
        )
        torch.testing.assert_close(size, exact, rtol=6e-3, atol=0)
