"""The adapted layer starts as its base, has its formula's gradients, and exports what it computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_ray.adapter.inject import inject
from olora_ray.adapter.layer import (
    AdaptedLinear,
    AdaptedWeight,
    Factors,
    add_low_rank,
    joined,
)
from olora_ray.adapter.methods import method_named
from olora_ray.train.loop import train_mode

RANK, SCALE = 4, 1.5


def factors(weight: Tensor, method: str = "olora", rank: int = RANK) -> Factors:
    return method_named(method).factors(weight.float(), rank, 0)


def change(layer: AdaptedWeight, size: float, seed: int = 0) -> None:
    """Move dA and dB by `size` relative to the factors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter, start in (
        (layer.da, layer.a0),
        (layer.db, layer.a0 if layer.b0 is None else layer.b0),
    ):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * (size * start.norm() / noise.norm())


def one_layer(
    m: int, n: int, method: str = "olora", rank: int = RANK, **options: Any
) -> AdaptedLinear:
    torch.manual_seed(1)
    base = nn.Linear(n, m)
    return AdaptedLinear(base, factors(base.weight.detach(), method, rank), SCALE, **options)


def formula(y: Tensor, x: Tensor, da: Tensor, db: Tensor, a0: Tensor, b0: Tensor | None) -> Tensor:
    if b0 is None:
        return y + SCALE * (x @ (a0 + da).T) @ db.T
    return y + SCALE * ((x @ a0.T) @ db.T + (x @ da.T) @ (b0 + db).T)


@pytest.mark.parametrize("with_b0", [True, False], ids=["stacked", "plain"])
@pytest.mark.parametrize("leading", [(7,), (2, 5), (2, 1, 3)])
def test_output_and_gradients_are_those_of_the_formula(
    with_b0: bool, leading: tuple[int, ...]
) -> None:
    torch.manual_seed(2)
    m, n = 9, 6

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = y, x, da, db = leaf(*leading, m), leaf(*leading, n), leaf(RANK, n), leaf(m, RANK)
    a0, b0 = leaf(RANK, n).detach(), leaf(m, RANK).detach() if with_b0 else None
    weights = torch.randn(*leading, m, dtype=torch.float64)
    down, up = joined(da.detach(), db.detach(), a0, b0, torch.float64)
    found = add_low_rank(y.clone(), x, da, db, down, up, SCALE)
    expected = formula(y, x, da, db, a0, b0)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True
    ):
        # dA and dB are float32 parameters: their gradients are rounded to it.
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_the_contribution_in_bfloat16_is_within_one_percent(size: float) -> None:
    torch.manual_seed(3)
    m = n = 512
    weight, x = torch.randn(m, n) / n**0.5, torch.randn(64, n).bfloat16()
    base = nn.Linear(n, m, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(base.weight)  # so that the output is the contribution
    layer = AdaptedLinear(base, factors(weight, rank=16), SCALE)
    change(layer, size)
    assert layer.b0 is not None
    a0, b0, da, db = (part.detach().double() for part in (layer.a0, layer.b0, layer.da, layer.db))
    exact = SCALE * x.double() @ (db @ a0 + (b0 + db) @ da).T
    # The difference of two products, which this form avoids, is noise: its error is above 0.1.
    assert (layer(x).detach().double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("method", ["olora", "lora"])
def test_adapter_equals_merged_weight_and_exported_lora(method: str) -> None:
    layer = one_layer(9, 6, method)
    change(layer, 0.3)
    x, weights = torch.randn(5, 6), layer.weights()
    delta = weights.delta(SCALE)
    lora_a, lora_b = weights.plain_lora()
    rank = 2 * RANK if method == "olora" else RANK
    assert lora_a.shape == (rank, 6)
    assert lora_b.shape == (9, rank)
    torch.testing.assert_close(SCALE * lora_b @ lora_a, delta)
    torch.testing.assert_close(layer(x), x @ (layer.base.weight + delta).T + layer.base.bias)


def test_dropout_is_for_training_alone() -> None:
    layer, plain = one_layer(9, 6, dropout=0.5), one_layer(9, 6)
    change(layer, 0.3)
    change(plain, 0.3)
    x = torch.randn(5, 6)
    layer.eval()
    assert torch.equal(layer(x), plain(x))
    layer.train()
    assert torch.equal(one_layer(9, 6, dropout=0.5).train()(x), layer.base(x)), (
        "the start equals the base"
    )
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, plain(x))
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))


def test_factors_made_in_inference_mode_can_be_trained_with() -> None:
    base = nn.Linear(6, 9)
    with torch.inference_mode():
        start = factors(base.weight)
    layer = AdaptedLinear(base, start, SCALE)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.da.grad is not None


def test_a_layer_is_seen_as_it_is_by_whoever_changes_it() -> None:
    layer, x = one_layer(9, 6), torch.randn(5, 6)
    layer.train()
    seen = [layer(x)]
    with torch.no_grad():
        layer.db.fill_(0.1)  # while it trains
    seen.append(layer(x))
    layer.da.grad, layer.db.grad = torch.ones_like(layer.da), torch.ones_like(layer.db)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    seen.append(layer(x))
    layer.eval()
    layer.db.data.fill_(0.3)  # which leaves no trace
    seen.append(layer(x))
    layer.db.data = torch.full_like(layer.db, 0.4)
    seen.append(layer(x))
    layer.train()
    seen.append(layer(x))
    values = [part.detach().sum().item() for part in seen]
    assert values[-1] == values[-2]
    assert len(set(values)) == len(values) - 1
    fresh = one_layer(9, 6)
    fresh.da.data, fresh.db.data = layer.da.data, layer.db.data
    assert torch.equal(seen[-1], fresh(x))


class Block(nn.Module):
    """Layers that get the same x, as those of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, m, m != 4) for m in (6, 4, 8, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = q.mul_(2).tanh()  # some families change an output in place
        return self.o(x), k, v


def adapted_block(
    training: bool, method: str = "olora", dropout: float = 0.0
) -> tuple[Any, list[nn.Parameter]]:
    torch.manual_seed(1)
    block: Any = Block()
    start = {
        name: factors(layer.weight.detach(), method, 2) for name, layer in block.named_children()
    }
    layers = inject(block, start, 1.5, dropout)
    parts = [part for layer in layers.values() for part in (layer.da, layer.db)]
    for part in parts:
        part.data.normal_(0.0, 0.3)
    train_mode(layers, training)
    return block, parts


def test_with_dropout_x_has_two_gradients() -> None:
    block, _ = adapted_block(True, dropout=0.5)
    x = torch.randn(3, 6, requires_grad=True)
    torch.manual_seed(0)
    found = torch.autograd.grad(block.q(x).sum(), x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = block.q.base(x - dropped) + block.q.plainly(dropped)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_are_added_to_those_of_a_training(hooked: bool) -> None:
    found = []
    seen: list[Tensor] = []
    for training in (False, True):
        block, parts = adapted_block(training)
        for part in parts:
            part.grad = torch.ones_like(part)
        if hooked:
            parts[0].register_hook(seen.append)
        sum(each.sin().sum() for each in block(torch.linspace(-1, 1, 18).view(3, 6))).backward()
        found.append([part.grad for part in parts])
    assert all(map(torch.equal, *found))
    assert len(seen) == 2 * hooked
