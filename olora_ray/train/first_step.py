"""The first step of Adam: how far it moves the output of each adapted layer.

Adam's first step changes each number by lr, against the sign of its gradient. With A = A0 + dA and B = B0 + dB, inputs
x (T x n), outputs y (T x m) and gradients g of the loss at y (T x m), the output of a layer moves, per unit of s lr and
as a share of the size of y, by

    through dB: rms(A x sign(g^T A x)) / rms(y)        through dA: rms(B sign((g B)^T x) x) / rms(y)

One forward and one backward pass of one row give both numbers. They hardly depend on which rows, or on how many.
Measured on SmolLM2-135M: evened on one row, the moves of 80 % of the layers stay within a factor of 1.3 on others.

Best learning rates of methods, ranks and scales are roughly in inverse proportion to the move.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.adapter.methods import METHODS, Options
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.plan import Pack
from olora_ray.train.loss import SupervisedLoss, watched

RATE = 4.0e-3
"""Peak rate x s x the geometric mean of the layers' moves, from tuned trainings of 20 steps (docs/method.md)."""


LONGEST = 512


def example(packs: Sequence[Pack]) -> Pack:
    """Return the longest example of these sequences, cut to the LONGEST tokens that end with its last supervised one.

    The measurement keeps the inputs of all layers at once, which a step with activation checkpointing does not. So it
    takes one short example, whatever the batches of the training are.
    """
    parts = []
    for pack in packs:
        borders = np.cumsum(pack.segments)[:-1]
        for ids, supervised in zip(np.split(pack.input_ids, borders), np.split(pack.supervised, borders), strict=True):
            end = int(np.flatnonzero(supervised)[-1]) + 1 if supervised.any() else 0
            begin = max(0, end - LONGEST)
            parts.append(Pack(ids[begin:end], supervised[begin:end], (end - begin,)))
    return max(parts, key=lambda part: len(part.input_ids))


@dataclass(frozen=True)
class Move:
    """The move of one layer's output, per unit of s lr, as a share of the output's size."""

    b: float
    """Through dB."""
    a: float
    """Through dA; 0 without a B0."""
    lora: float
    """Plain LoRA's, through dB."""

    def size(self, ratio: float = 1.0) -> float:
        """Return the move through both paths if B learns `ratio` times as fast as A."""
        return math.hypot(self.a, ratio * self.b)


def moves(loss: SupervisedLoss, adapted: Mapping[str, AdaptedWeight], batch: Batch) -> dict[str, Move]:
    """Return the move of each layer that has a gradient; layers of stacked experts are left out.

    All workers of a sharded base must call it together.
    """
    layers = {name: layer for name, layer in adapted.items() if layer.a0.dim() == 2}
    result: dict[str, Move] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if not y.requires_grad:  # a part of the model that runs without gradients
            return
        size = y.detach().float().square().mean().sqrt()
        y.register_hook(partial(measure, name, x.detach(), size))

    def measure(name: str, entered: Tensor, size: Tensor, gradient: Tensor) -> None:
        x = entered.reshape(-1, layers[name].a0.shape[1]).float()
        move = _move(layers[name], x, gradient.reshape(len(x), -1).float(), size)
        if move is not None:
            result[name] = move

    model: Any = loss.model
    modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in layers}
    with torch.enable_grad(), watched(modules, see):
        # Not `backward`: it would add to the gradients of the training.
        parts = [part for layer in adapted.values() for part in (layer.da, layer.db)]
        torch.autograd.grad(loss(batch), parts, allow_unused=True)  # some experts may see no token
    return {name: result[name] for name in layers if name in result}


@torch.no_grad()
def even(adapted: Mapping[str, AdaptedWeight], measured: Mapping[str, Move]) -> dict[str, Move]:
    """Rescale the factors of each measured layer: its move becomes plain LoRA's, half of its square by each path.

    Return the moves that follow: they are in proportion to A0 and to B0.
    """
    for name, move in measured.items():
        layer, share = adapted[name], move.lora / math.sqrt(2)
        layer.a0.mul_(share / move.b)
        assert layer.b0 is not None
        layer.b0.mul_(share / move.a)
    return {
        name: Move(move.lora / math.sqrt(2), move.lora / math.sqrt(2), move.lora) for name, move in measured.items()
    }


def best_rate(measured: Mapping[str, Move], scale: float, ratio: float = 1.0) -> float:
    """Return the peak learning rate for adapters of this scale s, with two digits; `measured` is not empty.

    `ratio` is train.lr_ratio.
    """
    mean = math.exp(sum(math.log(move.size(ratio)) for move in measured.values()) / len(measured))
    return float(f"{RATE / (scale * mean):.1e}")


@torch.no_grad()
def _move(layer: AdaptedWeight, x: Tensor, g: Tensor, size: Tensor) -> Move | None:
    a = layer.a0 + layer.da
    b = layer.db if layer.b0 is None else layer.b0 + layer.db
    # LoRA's A0 needs no more of the weight than its number of columns.
    plain = METHODS["lora"].factors(x.new_empty(1, x.shape[1]), len(a), 0, Options()).a0
    found = (_through_b(x, g, a), _through_a(x, g, b), _through_b(x, g, plain))
    by_b, by_a, lora = (float(move.square().mean().sqrt() / size) for move in found)
    moves_at_all = by_b > 0 and lora > 0 and (by_a > 0 or layer.b0 is None)
    return Move(by_b, by_a, lora) if moves_at_all and math.isfinite(by_b + by_a + lora) else None


def _through_b(x: Tensor, g: Tensor, a: Tensor) -> Tensor:
    hidden = x @ a.T
    return hidden @ (g.T @ hidden).sign().T


def _through_a(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    return x @ ((g @ b).T @ x).sign().T @ b.T
