"""Recomputation of activations: of each block the input alone is kept, and the backward pass runs the block again.

What a block keeps for its backward pass is most of a training's memory at long sequences; with this it is one hidden
state a block, and all that one block keeps, for up to half more time. The second run sees the same inputs, weights
and random numbers (dropout), so that losses and gradients are the same bits; check_same looks before step 0.

torch.utils.checkpoint is put around the blocks here: transformers' own switch asks whether the model is in training
mode, and the frozen base never is.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from olora_ray.common.errors import UserError
from olora_ray.train.blocks import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from olora_ray.train.loss import SupervisedLoss

CLOSE = 1e-3
"""Largest difference, relative to the gradient's norm, on devices whose kernels do not add in a fixed order."""


def install(loss: "SupervisedLoss") -> None:
    """Let the blocks of the model be run again, if `loss.recompute` says so; may be called again.

    From then on `loss.recompute` is a switch. Works inside FSDP2 too: a block is gathered before its backward pass.
    """
    if not loss.recompute:
        return
    for block in decoder_layers(loss.model):
        if not isinstance(block.forward, _Recomputed):
            block.__dict__["forward"] = _Recomputed(block.forward, loss)


class _Recomputed:
    """The forward of a block, which keeps its inputs alone where a gradient is wanted."""

    def __init__(self, forward: Callable[..., Any], loss: "SupervisedLoss") -> None:
        self.__wrapped__ = forward  # whoever asks for its signature gets that
        self._loss = loss

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the block returns for these inputs."""
        if not (self._loss.recompute and torch.is_grad_enabled()) or _has_cache((*inputs, *named.values())):
            return self.__wrapped__(*inputs, **named)
        # Named inputs too are handed over as inputs: on the devices of these the random numbers are kept.
        return checkpoint(self._run, inputs, named, use_reentrant=False, preserve_rng_state=True)

    def _run(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        return self.__wrapped__(*inputs, **named)


def _has_cache(values: Sequence[Any]) -> bool:
    """Whether keys and values are kept for later tokens: a second run would add them again."""
    from transformers import Cache

    return any(isinstance(value, Cache) for value in values)


@contextmanager
def switched(loss: "SupervisedLoss", on: bool) -> "Iterator[None]":
    """With recomputation on or off; on has an effect only after `install`."""
    before, loss.recompute = loss.recompute, on
    try:
        yield
    finally:
        loss.recompute = before


def check_same(family: str, with_it: Sequence[Tensor], without: Sequence[Tensor]) -> None:
    """Raise UserError unless the gradients with recomputation are those without it: the same bits on CPUs.

    A block that changes its inputs, or something outside, would do it twice.
    """
    if all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True)):
        return
    off, norm = (
        float(torch.stack([part.float().norm() for part in parts]).norm())
        for parts in ([one - other for one, other in zip(with_it, without, strict=True)], without)
    )
    if without[0].device.type == "cpu" or not off <= CLOSE * norm:
        raise UserError(
            f"train.activation_checkpointing: the gradients of {family} differ by {off / norm:.2g} when its blocks are"
            " run again; set it to false, and lower train.micro_batch or data.max_length if memory is short"
        )
