"""The first steps of Adam: how far they move the output of each adapted layer, and the learning rate that suits them.

Adam's first step changes each number by lr, against the sign of its gradient. With A = A0 + dA and B = B0 + dB, inputs
x (T x n), outputs y (T x m) and gradients g of the loss at y (T x m), a layer's output moves, per unit of s lr, by
A x sign(g^T A x) through dB and by B sign((g B)^T x) x through dA.

The learning rate is the one at which a step of B and then a step of A move the outputs by FARTHEST (`peak_lr`). The
second step counts what A does through the new B: without B0 that is most of the move. Tuned rates of trainings of 20
steps of SmolLM2 lie within a factor of 1.6 of this rate for five methods (docs/generated/learning_rate.md).

One forward and one backward pass over LONGEST tokens give these numbers. They hardly depend on which rows, or on how
many: on SmolLM2-135M the rate from 128 tokens was within 9 % of that from 512 (lora, olora, nora; three tasks). A few
tokens move further: the signs of their gradient agree better with each of them.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.plan import Pack
from olora_ray.train.loss import SupervisedLoss, watched

logger = logging.getLogger(__name__)

FARTHEST = 0.0075
"""Move of the outputs at the best rate of 20 steps: the geometric mean over layers, as a share of their size."""
RATES = tuple(2.0**power for power in range(-20, -3))
"""Rates at which the move is measured."""
LONGEST = 128


def examples(packs: Sequence[Pack]) -> list[Pack]:
    """Return the longest examples of these sequences: as many as fill LONGEST tokens, but one at least.

    Each is cut to the LONGEST tokens that end with its last supervised one. The measurement keeps the inputs of all
    layers at once, which a step with activation checkpointing does not. So it takes no more tokens than these, whatever
    the batches of the training are. Padding counts as tokens: some attention needs it.
    """
    parts = []
    for pack in packs:
        borders = np.cumsum(pack.segments)[:-1]
        for ids, supervised in zip(
            np.split(pack.input_ids, borders), np.split(pack.supervised, borders), strict=True
        ):
            end = int(np.flatnonzero(supervised)[-1]) + 1 if supervised.any() else 0
            begin = max(0, end - LONGEST)
            parts.append(Pack(ids[begin:end], supervised[begin:end], (end - begin,)))
    parts.sort(key=lambda part: len(part.input_ids), reverse=True)
    return parts[: LONGEST // max(1, len(parts[0].input_ids))]


Move = tuple[float, ...]
"""Move of a layer's output by a step of B and then one of A at each of RATES, for s = 1, as a share of its size."""


def output_shift(
    loss: SupervisedLoss, adapted: Mapping[str, AdaptedWeight], batch: Batch, ratio: float = 1.0
) -> dict[str, Move]:
    """Return the move of each layer that has a gradient; layers of stacked experts are left out.

    `ratio` is train.lr_ratio. All workers of a sharded base must call it together.
    """
    layers = {name: layer for name, layer in adapted.items() if layer.a0.dim() == 2}
    result: dict[str, Move] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if not y.requires_grad:  # a part of the model that runs without gradients
            return
        y.register_hook(
            partial(measure, name, x.detach(), y.detach().float().square().mean().sqrt())
        )

    def measure(name: str, entered: Tensor, size: Tensor, gradient: Tensor) -> None:
        x = entered.reshape(-1, layers[name].a0.shape[1]).float()
        move = _move(layers[name], x, gradient.reshape(len(x), -1).float(), size, ratio)
        if move:
            result[name] = move

    modules: dict[str, nn.Module] = {name: loss.model.get_submodule(name) for name in layers}
    with torch.enable_grad(), watched(modules, see):
        # Not `backward`: it would add to the gradients of the training.
        parts = list(chain.from_iterable((layer.da, layer.db) for layer in adapted.values()))
        torch.autograd.grad(loss(batch), parts, allow_unused=True)  # some experts may see no token
    return {name: result[name] for name in layers if name in result}


def peak_lr(measured: Mapping[str, Move], scale: float, steps: int) -> float:
    """Return the peak learning rate for adapters of this scale s in a training of `steps` steps, with two digits.

    `measured` is not empty.
    """
    sizes = np.mean([np.log(move) for move in measured.values()], axis=0) + math.log(scale)
    # The first rate that moves them so far: at large rates the steps of B and of A may take back each other's move.
    sizes = np.maximum.accumulate(sizes)
    if not sizes[0] < math.log(FARTHEST) < sizes[-1]:
        logger.warning(
            "the automatic learning rate is at an end of the range that is measured,"
            f" {RATES[0]:.2g} to {RATES[-1]:.2g}: check adapter.alpha, or set train.lr"
        )
    return for_steps(math.exp(np.interp(math.log(FARTHEST), sizes, np.log(RATES))), steps)


def for_steps(rate: float, steps: int, made_for: int = 20) -> float:
    """Return the peak learning rate of a training of `steps` steps, with two digits, from that of another length."""
    return float(f"{rate * (made_for / steps) ** 0.25:.1e}")


@torch.no_grad()
def _move(layer: AdaptedWeight, x: Tensor, g: Tensor, size: Tensor, ratio: float) -> Move | None:
    a = layer.a0 + layer.da
    b = layer.db if layer.b0 is None else layer.b0 + layer.db
    hidden = x @ a.T
    db = (g.T @ hidden).sign()
    # A's steps after a step of B at each rate. What they do to x is one product for all rates.
    rates = ratio * x.new_tensor(RATES)[:, None, None]
    steps = ((g @ b).T @ x - rates * ((g @ db).T @ x)).sign_()
    stepped = (x @ steps.flatten(0, 1).T).unflatten(1, steps.shape[:2]).transpose(0, 1)
    # The move is ratio * hidden @ db.T + stepped @ (b - rate * db).T, which is larger than its factors. The sum of its
    # squares needs only their products with each other, in float64, because the two parts may cancel.
    h, d, b, s, c = (each.double() for each in (ratio * hidden, db, b, stepped, rates))
    dd = d.T @ d
    db_ = d.T @ b
    bb = b.T @ b
    ss = s.mT @ s
    new = bb - c * (db_ + db_.T) + c.square() * dd
    squares = (h.T @ h * dd + 2 * (h.T @ s) * (db_ - c * dd) + ss * new).sum((1, 2))
    sizes = ((squares.clamp(min=0) / (len(x) * len(d))).sqrt() / size).tolist()
    move = tuple(rate * each for rate, each in zip(RATES, sizes, strict=True))
    return move if min(move) > 0 and math.isfinite(sum(move)) else None
