"""The trainable parameters as one flat vector, AdamW over it, and the learning-rate schedule.

All dA and dB of a model are views of one float32 vector, and so are their gradients: the exchange
between workers is one all-reduce, clipping one norm, the optimizer one tensor, whatever the layers.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives
from olora_ray.config.schema import Train


class FlatAdapters:
    """Parameters and gradients of all adapters, laid out in the order of the names."""

    def __init__(self, adapted: Mapping[str, AdaptedWeight]) -> None:
        self.slots: dict[str, Tensor] = {
            f"{name}.{part}": getattr(layer, part) for name, layer in adapted.items() for part in ("da", "db")
        }
        first = next(iter(self.slots.values()))
        self.vector = torch.cat([slot.detach().reshape(-1) for slot in self.slots.values()])
        self.grad = torch.zeros_like(self.vector, device=first.device)
        for name, slot in self.slots.items():
            slot.data = self.view(self.vector, name)
            slot.grad = self.view(self.grad, name)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """The part of a flat vector that belongs to the parameter `name`, in its shape."""
        if not hasattr(self, "_places"):
            self._places, place = {}, 0
            for key, slot in self.slots.items():
                self._places[key] = (place, slot.numel())
                place += slot.numel()
        start, size = self._places[name]
        return vector[start : start + size].view(self.slots[name].shape)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector as named tensors (views)."""
        return {name: self.view(vector, name) for name in self.slots}

    def load(self, vector: Tensor, named: Mapping[str, Tensor]) -> None:
        """Write named tensors into a flat vector; raises KeyError if one is missing."""
        for name in self.slots:
            self.view(vector, name).copy_(named[name])

    def reduce(self) -> None:
        """Sum the gradients of all workers: one all-reduce, always in the same order of elements."""
        collectives.sum_in_place(self.grad)


class AdamW:
    """AdamW (arXiv 1711.05101) on the flat vector; decay pulls the adapter towards its start."""

    def __init__(self, flat: FlatAdapters, config: Train) -> None:
        self.flat, self.config = flat, config
        self.parameter = torch.nn.Parameter(flat.vector)
        self.parameter.grad = flat.grad
        self.inner = torch.optim.AdamW([self.parameter], lr=config.lr, weight_decay=config.weight_decay)
        self.inner.state[self.parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(flat.vector),
            "exp_avg_sq": torch.zeros_like(flat.vector),
        }

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, clear the gradients; returns the norm before clipping."""
        norm = float(self.flat.grad.norm())
        if self.config.clip is not None and norm > self.config.clip:
            self.flat.grad.mul_(self.config.clip / norm)
        self.inner.param_groups[0]["lr"] = lr
        self.inner.step()
        self.flat.grad.zero_()
        return norm

    def state(self) -> dict[str, Tensor]:
        """The moments as named tensors (views), without the step count."""
        moments = self.inner.state[self.parameter]
        return {
            f"{name}.{key}": part
            for key in ("exp_avg", "exp_avg_sq")
            for name, part in self.flat.named(moments[key]).items()
        }

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        """Resume with the moments of `state` after `step` updates."""
        moments = self.inner.state[self.parameter]
        moments["step"].fill_(float(step))
        for key in ("exp_avg", "exp_avg_sq"):
            part = {name: named[f"{name}.{key}"] for name in self.flat.slots}
            self.flat.load(moments[key], part)


def lr_at(step: int, steps: int, config: Train) -> float:
    """Learning rate of update number `step` (from 0) of `steps`: linear warm-up, then the schedule.

    cosine and linear reach 0 after the last step.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * shape(config.schedule, (step - warmup) / max(1, steps - warmup))


def shape(schedule: str, progress: float) -> float:
    """The share of the peak rate at `progress`, 0 to 1, between the end of the warm-up and that of the run."""
    shapes = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }
    return shapes[schedule]
