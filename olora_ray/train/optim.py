"""The trainable parameters as one flat vector, AdamW over it, and the learning-rate schedule.

All dA and dB of a model are views of one float32 vector, and so are their gradients: what is summed over micro-batches
and workers (train/tree.py) is one vector, clipping one norm, the optimizer one tensor, whatever the layers.
With another learning rate for B than for A (LoRA+, arXiv 2402.12354) it is two: all dA, then all dB.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.config.schema import Train
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import Waiting, total_steps, until


class FlatAdapters:
    """Parameters and gradients of all adapters, laid out in the order of the names.

    `apart`: all dA come before all dB; else each dB follows its dA.
    """

    def __init__(self, adapted: Mapping[str, AdaptedWeight], apart: bool = False) -> None:
        pairs = [(name, part) for name in adapted for part in ("da", "db")]
        if apart:
            pairs.sort(key=lambda pair: pair[1])
        self.slots: dict[str, Tensor] = {f"{name}.{part}": getattr(adapted[name], part) for name, part in pairs}
        first = next(iter(self.slots.values()))
        self.vector = torch.cat([slot.detach().reshape(-1) for slot in self.slots.values()])
        self.grad = torch.zeros_like(self.vector, device=first.device)
        for name, slot in self.slots.items():
            slot.data = self.view(self.vector, name)
            slot.grad = self.view(self.grad, name)
        size, of_a = self.vector.numel(), sum(layer.da.numel() for layer in adapted.values())
        self.groups = [slice(0, of_a), slice(of_a, size)] if apart else [slice(0, size)]
        """Parts of the vector with a learning rate each."""

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


class AdamW:
    """AdamW (arXiv 1711.05101) on the flat vector; decay pulls the adapter towards its start.

    The vector is laid out `apart` if `config.lr_ratio` is not 1. On a GPU an update is one kernel; on CPUs it is
    torch's plain one, whose bytes are those of all runs so far.
    """

    def __init__(self, flat: FlatAdapters, config: Train) -> None:
        self.flat, self.config = flat, config
        self.moments = {key: torch.zeros_like(flat.vector) for key in ("exp_avg", "exp_avg_sq")}
        self.parameters = [torch.nn.Parameter(flat.vector[group]) for group in flat.groups]
        groups = [{"params": [parameter]} for parameter in self.parameters]
        fused = has_fused_kernel(flat.vector.device)
        self.inner = torch.optim.AdamW(
            groups, lr=config.lr, weight_decay=config.weight_decay, fused=True if fused else None
        )
        for parameter, group in zip(self.parameters, flat.groups, strict=True):
            parameter.grad = flat.grad[group]
            moments = {key: moment[group] for key, moment in self.moments.items()}
            count = torch.zeros((), dtype=torch.float32, device=flat.vector.device if fused else None)
            self.inner.state[parameter] = {"step": count, **moments}
        self.ratios = [1.0] if config.lr_ratio == 1 else [1.0, config.lr_ratio]

    def step(self, lr: float, norm: float | None = None) -> float:
        """Clip and update with learning rate `lr` (of dA); returns the norm before clipping.

        Where the gradient's `norm` is known, nothing waits for the device.
        """
        norm = float(self.flat.grad.norm()) if norm is None else norm
        if self.config.clip is not None and norm > self.config.clip:
            self.flat.grad.mul_(self.config.clip / norm)
        for group, ratio in zip(self.inner.param_groups, self.ratios, strict=True):
            group["lr"] = lr * ratio
        self.inner.step()
        return norm

    def state(self) -> dict[str, Tensor]:
        """The moments as named tensors (views), without the step count."""
        return {
            f"{name}.{key}": part
            for key, moment in self.moments.items()
            for name, part in self.flat.named(moment).items()
        }

    def at(self, step: int) -> None:
        """Count `step` updates as done."""
        for parameter in self.parameters:
            self.inner.state[parameter]["step"].fill_(float(step))

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        """Resume with the moments of `state` after `step` updates."""
        self.at(step)
        for key, moment in self.moments.items():
            part = {name: named[f"{name}.{key}"] for name in self.flat.slots}
            self.flat.load(moment, part)


def has_fused_kernel(device: torch.device) -> bool:
    """Whether AdamW is one kernel there. CPUs have one, too, whose results differ in their last bits from the plain."""
    return device.type == "cuda"


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


# Schedule of a run: its length and the learning rate of each step, also while the token store is still growing.


class Schedule:
    """Length and learning rates of a run."""

    def __init__(self, train: Train, store: TokenStore, waiting: Waiting | None = None) -> None:
        """`waiting` is called while `last` and `lr` wait for shards."""
        self.train, self.store, self.waiting = train, store, waiting

    def total(self) -> int | None:
        """Steps of the run; None while the store does not tell yet."""
        if self.train.steps is None and self.store.total is None:
            self.store.refresh()
        return self._total()

    def ends(self, steps_done: int) -> bool | None:
        """Whether the run is over after so many steps; None while that is not certain. Does not look for shards."""
        total = self._total()
        if total is not None:
            return steps_done >= total
        # More sequences never make fewer steps.
        return False if steps_done < total_steps(self.train, self.store.available) else None

    def last(self, steps_done: int) -> bool:
        """Whether the run is over after so many steps; waits for shards until it is certain."""
        until(self.store, lambda: self.ends(steps_done) is not None, self.waiting)
        return bool(self.ends(steps_done))

    def lr(self, step: int) -> float:
        """Learning rate of update number `step`, from 0; waits for the shards that the step reads."""
        size = self.train.global_batch
        if self.train.steps is None:
            until(self.store, lambda: self._knows((step + 1) * size), self.waiting)
        total = self._total()
        if total is not None and (self.train.steps is not None or self.store.shard_count == 1):
            return lr_at(step, total, self.train)
        warmup, begin = self.train.warmup, self._progress(step * size, after=False)
        if begin < warmup:
            return self.train.lr * min(1.0, self._progress((step + 1) * size - 1, after=True) / warmup)
        return self.train.lr * shape(self.train.schedule, (begin - warmup) / (1.0 - warmup))

    def _total(self) -> int | None:
        packs = self.store.total
        return self.train.steps or (None if packs is None else total_steps(self.train, packs))

    def _knows(self, places: int) -> bool:
        return self.store.total is not None or (self.store.shard_count > 1 and places <= self.store.available)

    def _progress(self, place: int, after: bool) -> float:
        """Progress at, or just after, a place of the training order; 0 to 1."""
        packs = self.store.total
        epoch, inside = divmod(place, packs) if packs else (0, place)
        if epoch == 0:
            shard, row, rows = self.store.locate(inside)
            fraction = (shard + (row + after) / rows) / self.store.shard_count
        else:
            assert packs is not None
            fraction = (inside + after) / packs
        # A part of an epoch can lie in shards that are smaller than the others.
        return min(1.0, (epoch + fraction) / self.train.epochs)


# The preconditioner of NoRA+ (arXiv 2410.18965) and of Riemannian preconditioned LoRA (arXiv 2402.02347).


EPSILON = 1e-6


@torch.no_grad()
def precondition(adapted: Mapping[str, AdaptedWeight], epsilon: float = EPSILON, unit: bool = True) -> None:
    """Replace the gradients of all dA and dB in place; with `unit` each has norm 1 afterwards, or is zero."""
    for layer in adapted.values():
        a = layer.a0 + layer.da
        b = layer.db if layer.b0 is None else layer.b0 + layer.db
        grad_a, grad_b = layer.da.grad, layer.db.grad
        assert grad_a is not None
        assert grad_b is not None
        new_a = _solve(b.mT, grad_a, epsilon)
        new_b = _solve(a, grad_b.mT, epsilon).mT
        grad_a.copy_(_unit(new_a) if unit else new_a)
        grad_b.copy_(_unit(new_b) if unit else new_b)


def _solve(rows: Tensor, right: Tensor, epsilon: float) -> Tensor:
    """(rows rows^T + eps I)^-1 right in float64, for `rows` ((E x) r x k) and `right` ((E x) r x l)."""
    wide = rows.double()
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    # Without a check: what is not finite shows in the norm of the gradient, which is looked at after each step.
    return torch.cholesky_solve(right.double(), torch.linalg.cholesky_ex(gram).L)


def _unit(gradient: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(gradient, keepdim=True)
    return gradient / torch.where(norm > 0, norm, 1.0)
