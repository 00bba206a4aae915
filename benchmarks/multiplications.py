"""Minimum of floating-point operations of a training of adapters, and the matrix rate of a machine.

An operation is one multiplication or one addition. For T tokens, a weight of m x n, adapters of width k (2 r if the
method has a B0, otherwise r), segments of L tokens, H heads of size D, S supervised tokens and a vocabulary of V:

    base, forward and dX     2 T m n each; no dX where the layer's input has no gradient
    low-rank paths           2 T k (m + n) forward and for dX, 2 T r (m + n) for dA and dB
    attention, causal        12 H D L (L + 1) / 2 for each segment and layer: two products forward, four backward
    output head              2 S V h forward and for dX, over the supervised positions alone

Repeated work (attention scores, recomputed blocks), padding, and operations other than products of matrices do not
count.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olora_ray.train.sharded_reader import decoder_layers

Shape = tuple[int, int, int]
"""(rows, input columns, output columns) of a product."""


@dataclass(frozen=True)
class Shapes:
    """The properties of a model with adapters that decide the number of operations."""

    weights: dict[str, tuple[int, int]]
    """(m, n) of the adapted layers."""
    without_dx: frozenset[str]
    """The adapted layers whose input has no gradient: the first ones after the embedding."""
    rank: int
    width: int
    """k: columns of the low-rank path."""
    layers: int
    attended: int
    """Number of heads times their size."""
    hidden: int
    vocabulary: int


def shapes_of(trainer: Any, batch: Any) -> Shapes:
    """Return the shapes of a trainer's model; runs one forward pass over the batch."""
    config = trainer.loss.model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer = next(iter(trainer.adapted.values()))
    rank = layer.da.shape[-2]
    return Shapes(
        weights={
            name: (found.db.shape[0], found.da.shape[1]) for name, found in trainer.adapted.items()
        },
        without_dx=frozenset(_without_gradient(trainer, batch)),
        rank=rank,
        width=rank if layer.b0 is None else 2 * rank,
        layers=len(decoder_layers(trainer.loss.model)),
        attended=heads * size,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def needed(shapes: Shapes, segments: Iterable[int], supervised: int) -> dict[str, float]:
    """Return part -> operations of a forward and backward pass over examples of these lengths."""
    lengths = list(segments)
    tokens = sum(lengths)
    each = {name: m * n for name, (m, n) in shapes.weights.items()}
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    # Forward, backward through B, dX if the input has a gradient; then dA and dB.
    low_rank = (2 * shapes.width + shapes.rank) * sum(m + n for m, n in shapes.weights.values())
    spared = shapes.width * sum(shapes.weights[name][1] for name in shapes.without_dx)
    return {
        "base, forward": 2.0 * tokens * sum(each.values()),
        "base, dX": 2.0
        * tokens
        * sum(size for name, size in each.items() if name not in shapes.without_dx),
        "low-rank paths": 2.0 * tokens * (low_rank - spared),
        "attention": 12.0 * shapes.layers * shapes.attended * pairs,
        "output head": 4.0 * supervised * shapes.vocabulary * shapes.hidden,
    }


def rates(
    shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device, seconds: float = 0.3
) -> dict[Shape, float]:
    """Return operations per second of torch.matmul per shape, the best of calls that take about `seconds`."""
    return {shape: _rate(shape, dtype, device, seconds) for shape in shapes}


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, including the work that it has started on a GPU."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    rows, inside, columns = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inside, generator=generator).to(device, dtype)
    w = torch.randn(columns, inside, generator=generator).to(
        device, dtype
    )  # as a layer keeps it: out x in
    best, spent = timed(lambda: x @ w.T, device), 0.0  # warms up
    while spent < seconds:
        took = timed(lambda: x @ w.T, device)
        best, spent = min(best, took), spent + took
    return 2.0 * rows * inside * columns / best


def _without_gradient(trainer: Any, batch: Any) -> Sequence[str]:
    found: list[str] = []

    def look(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            if not inputs[0].requires_grad:
                found.append(name)

        return hook

    handles = [
        layer.register_forward_pre_hook(look(name)) for name, layer in trainer.adapted.items()
    ]
    try:
        trainer.loss.hidden(batch.to(trainer.device))
    finally:
        for handle in handles:
            handle.remove()
    return found
