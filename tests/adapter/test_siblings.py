"""Layers that get the same input are computed together, and no number depends on what was computed before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_ray.adapter.inject import called_together, inject, install
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.train.loop import train_mode
from tests.adapter.test_layer import factors


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, m, m != 4) for m in (6, 4, 8, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = q.mul_(2).tanh()  # some families change an output in place
        return self.o(x), k, v


def adapted(
    training: bool, method: str = "olora", dropout: float = 0.0
) -> tuple[Any, dict[str, AdaptedWeight], Any]:
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
    return block, layers, parts


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("method", ["olora", "lora"])
def test_outputs_and_gradients_are_autograds(method: str, used: tuple[int, ...]) -> None:
    assert called_together(Block.forward) == [["k", "q", "v"]]
    block, _, parts = adapted(True, method)
    x, results = torch.randn(2, 3, 6, requires_grad=True), []
    for _ in range(2):
        found = block(x)
        total = torch.stack([found[number].sin().sum() for number in used]).sum()
        results.append([*found, *torch.autograd.grad(total, [x, *parts], allow_unused=True)])
        for part in block.children():
            part.forward = part.plainly
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("training", "happens"),
    [
        (True, lambda block, x: x.clone()),
        (True, lambda block, x: x.requires_grad_()),
        (True, lambda block, x: x.add_(1.0)),
        (True, lambda block, x: block.k(x)),  # which takes it
        (True, lambda block, x: block.k.da.detach().add_(1.0)),
        (True, lambda block, x: (block.k.db.data.add_(1.0), setattr(block.k, "training", True))),
        (False, lambda block, x: block.k.db.data.add_(1.0)),  # which leaves no trace
        (True, lambda block, x: install(block, adapted(True, "lora")[1])),
    ],
)
def test_an_output_of_something_else_is_never_taken(
    training: bool, happens: Callable[[Any, Tensor], Any]
) -> None:
    block, *_ = adapted(training)
    x = torch.randn(3, 6)
    given = block.q(x).grad_fn
    assert given is block.v(x).grad_fn
    changed = happens(block, x)
    x = changed if isinstance(changed, Tensor) and changed.shape == x.shape else x
    assert block.k(x).grad_fn is not given
    torch.testing.assert_close(block.k(x), block.k.plainly(x))


def test_with_dropout_x_has_two_gradients() -> None:
    block, *_ = adapted(True, dropout=0.5)
    x = torch.randn(3, 6, requires_grad=True)
    torch.manual_seed(0)
    found = torch.autograd.grad(block.q(x).sum(), x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = block.q.base(x - dropped) + block.q.plainly(dropped)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_are_added_to_those_of_a_training(hooked: bool) -> None:
    found, seen = [], list[Tensor]()
    for training in (False, True):
        block, _, parts = adapted(training)
        for part in parts:
            part.grad = torch.ones_like(part)
        if hooked:
            parts[0].register_hook(seen.append)
        sum(each.sin().sum() for each in block(torch.linspace(-1, 1, 18).view(3, 6))).backward()
        found.append([part.grad for part in parts])
    assert all(map(torch.equal, *found))
    assert len(seen) == 2 * hooked
