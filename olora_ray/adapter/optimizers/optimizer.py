"""The trainable parameters as one flat vector, and an optimizer over it.

All dA and dB of a model are views of one float32 vector, and their gradients are views of another. So the sum over
micro-batches and workers (train/tree.py) is the sum of one vector, clipping needs one norm, and the optimizer has one
tensor, whatever the layers. If B has another learning rate than A (LoRA+, arXiv 2402.12354), all dA come before all dB,
and the optimizer has two tensors.
"""

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.config.tables import OPTIMIZERS


class Settings(Protocol):
    """Settings that an optimizer may read from the config's section `train`; adapt() has no other settings."""

    @property
    def weight_decay(self) -> float: ...

    @property
    def lr_ratio(self) -> float: ...

    @property
    def clip(self) -> float | None: ...


class FlatAdapters:
    """Parameters and gradients of all adapters, in the order of the names.

    `apart`: all dA come before all dB; otherwise each dB follows its dA.
    """

    def __init__(self, adapted: Mapping[str, AdaptedWeight], apart: bool = False) -> None:
        self.layers = adapted
        pairs = list(itertools.product(adapted, ("da", "db")))
        if apart:
            pairs.sort(key=lambda pair: pair[1])
        self.slots: dict[str, Tensor] = {
            f"{name}.{part}": getattr(adapted[name], part) for name, part in pairs
        }
        sizes = [slot.numel() for slot in self.slots.values()]
        self._starts = dict(zip(self.slots, itertools.accumulate(sizes, initial=0), strict=False))
        self.vector = torch.cat([slot.detach().reshape(-1) for slot in self.slots.values()])
        self.grad = torch.zeros_like(self.vector)
        for name, slot in self.slots.items():
            slot.data = self.view(self.vector, name)
            slot.grad = self.view(self.grad, name)
        size = sum(sizes)
        of_a = sum(layer.da.numel() for layer in adapted.values())
        self.groups = [slice(0, of_a), slice(of_a, size)] if apart else [slice(0, size)]
        """Slices of the vector that have a learning rate of their own."""

    def view(self, vector: Tensor, name: str) -> Tensor:
        """Return the part of a flat vector that belongs to the parameter `name`, in its shape."""
        slot = self.slots[name]
        return vector[self._starts[name] :][: slot.numel()].view(slot.shape)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        return {name: self.view(vector, name) for name in self.slots}

    def load(self, vector: Tensor, named: Mapping[str, Tensor]) -> None:
        """Write named tensors into a flat vector; raises KeyError if one is missing."""
        for name in self.slots:
            self.view(vector, name).copy_(named[name])


def alike(layers: Mapping[str, AdaptedWeight]) -> list[list[str]]:
    """Return the names of the layers in groups that have one shape, and one scale, each."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[layer.da.shape[-2:], layer.db.shape[-2:], layer.db.dim(), layer.scale].append(name)
    return list(groups.values())


def a_of(layers: Sequence[AdaptedWeight]) -> Sequence[Tensor]:
    """Return A0 + dA of each of these layers."""
    return torch._foreach_add([layer.a0 for layer in layers], [layer.da for layer in layers])


def b_of(layers: Sequence[AdaptedWeight]) -> Sequence[Tensor]:
    """Return B0 + dB of each of these layers, of which all have a B0 or none has."""
    changes: list[Tensor] = [layer.db for layer in layers]
    starts = [layer.b0 for layer in layers if layer.b0 is not None]
    if not starts:
        return changes
    return torch._foreach_add(starts, changes)


def inverse_of(root: Tensor) -> Tensor:
    """Return (root root^T)^-1 for lower triangles `root` ((L x) r x r)."""
    if root.device.type == "cpu":
        return torch.cholesky_inverse(root)
    # On GPUs cholesky_inverse and cholesky_solve take one matrix after the other, with kernels for each.
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    half: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
    return half.mT @ half


class Update(ABC):
    """The optimizer of one training, with its moments.

    A subclass names its moments and says in `update` how a gradient changes `flat.vector`. If `config.lr_ratio` is not
    1, `flat` is laid out `apart`.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    """Names of the moments: flat vectors that start at 0 and are kept in checkpoints."""

    def __init__(
        self, flat: FlatAdapters, config: Settings, sizes: Mapping[str, Tensor] | None = None
    ) -> None:
        """`sizes`: the `weight_sizes` of the adapted weights, if `Optimizer.sizes` asks for them."""
        self.flat = flat
        self.config = config
        self.sizes = dict(sizes or {})
        self.moments = {key: torch.zeros_like(flat.vector) for key in self.keys}
        self.count = 0
        """Number of updates done."""

    def prepare(self) -> None:  # noqa: B027 - most optimizers leave the gradient as it is
        """Change the summed gradient in place, before its norm is taken."""

    @abstractmethod
    def update(self, lr: float) -> None:
        """Change `flat.vector` by the clipped gradient `flat.grad`; `lr` is the learning rate of dA.

        `count` includes this update already.
        """

    def step(self, lr: float, norm: float | None = None) -> float:
        """Clip and update with learning rate `lr` (of dA); return the norm before clipping.

        Pass the gradient's `norm` if it is known, so that the CPU does not wait for the device.
        """
        if norm is None:
            norm = float(self.flat.grad.norm())
        clip = self.config.clip
        if clip is not None and norm > clip:
            self.flat.grad.mul_(clip / norm)
        self.count += 1
        with torch.no_grad():
            self.update(lr)
        return norm

    def state(self, copied_to: str | None = None) -> dict[str, Tensor]:
        """Return the moments as named tensors, without the step count.

        They are views of the moments, or with `copied_to` of copies on that device.
        """
        state = {}
        for key, moment in self.moments.items():
            if copied_to:
                moment = moment.to(copied_to, copy=True)
            for name, part in self.flat.named(moment).items():
                state[f"{name}.{key}"] = part
        return state

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        """Take over what `state` returned after `step` updates."""
        self.count = step
        for key, moment in self.moments.items():
            part = {name: named[f"{name}.{key}"] for name in self.flat.slots}
            self.flat.load(moment, part)


Begin = Callable[[FlatAdapters, Settings, Mapping[str, Tensor] | None], Update]


@dataclass(frozen=True)
class Optimizer:
    """A member of the table, and all that other code may ask about it."""

    name: str
    """The value of `train.optimizer`."""
    begin: Begin
    """Makes the optimizer of a training: a subclass of Update."""
    sizes: bool = False
    """True if it needs the sizes of the adapted weights (`weight_sizes`) when a training starts."""
    rate: Callable[[int], float] | None = None
    """Rank of the adapter -> automatic peak rate of a training of 20 steps; None: measured on the first rows."""


@cache
def optimizer_named(name: str) -> Optimizer:
    return OPTIMIZERS.load(name, Optimizer)
