"""The trainable parameters as one flat vector, and AdamW over it.

All dA and dB of a model are views of one float32 vector, and their gradients are views of another. So the sum over
micro-batches and workers (train/tree.py) is the sum of one vector, clipping needs one norm, and the optimizer has one
tensor, whatever the layers. If B has another learning rate than A (LoRA+, arXiv 2402.12354), the optimizer has two
tensors: all dA, then all dB.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.config.schema import Train


class FlatAdapters:
    """Parameters and gradients of all adapters, in the order of the names.

    `apart`: all dA come before all dB; otherwise each dB follows its dA.
    """

    def __init__(self, adapted: Mapping[str, AdaptedWeight], apart: bool = False) -> None:
        pairs = [(name, part) for name in adapted for part in ("da", "db")]
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
        size, of_a = sum(sizes), sum(layer.da.numel() for layer in adapted.values())
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


class AdamW:
    """AdamW (arXiv 1711.05101) on the flat vector; decay pulls the adapter towards its start.

    If `config.lr_ratio` is not 1, `flat` must be laid out `apart`.
    """

    def __init__(self, flat: FlatAdapters, config: Train, fused: bool | None = None) -> None:
        """Prepare the moments. `fused`: an update is one kernel; None: on GPUs only."""
        self.flat, self.config = flat, config
        self.moments = {key: torch.zeros_like(flat.vector) for key in ("exp_avg", "exp_avg_sq")}
        self.parameters = [torch.nn.Parameter(flat.vector[group]) for group in flat.groups]
        groups = [{"params": [parameter]} for parameter in self.parameters]
        # On CPUs the fused kernel differs from the plain update in the last bits, so resumed runs would change.
        fused = flat.vector.device.type == "cuda" if fused is None else fused
        self.inner = torch.optim.AdamW(
            groups, lr=0.0, weight_decay=config.weight_decay, fused=True if fused else None
        )
        for parameter, group in zip(self.parameters, flat.groups, strict=True):
            parameter.grad = flat.grad[group]
            moments = {key: moment[group] for key, moment in self.moments.items()}
            count = torch.zeros(
                (), dtype=torch.float32, device=flat.vector.device if fused else None
            )
            self.inner.state[parameter] = {"step": count, **moments}
        self.ratios = [1.0] if config.lr_ratio == 1 else [1.0, config.lr_ratio]

    def step(self, lr: float, norm: float | None = None) -> float:
        """Clip and update with learning rate `lr` (of dA); return the norm before clipping.

        Pass the gradient's `norm` if it is known, so that the CPU does not wait for the device.
        """
        norm = float(self.flat.grad.norm()) if norm is None else norm
        if self.config.clip is not None and norm > self.config.clip:
            self.flat.grad.mul_(self.config.clip / norm)
        for group, ratio in zip(self.inner.param_groups, self.ratios, strict=True):
            group["lr"] = lr * ratio
        self.inner.step()
        return norm

    def state(self, copied_to: str | None = None) -> dict[str, Tensor]:
        """Return the moments as named tensors, without the step count.

        They are views of the moments, or with `copied_to` of copies on that device.
        """
        return {
            f"{name}.{key}": part
            for key, moment in self.moments.items()
            for name, part in self.flat.named(
                moment.to(copied_to, copy=True) if copied_to else moment
            ).items()
        }

    def at(self, step: int) -> None:
        for parameter in self.parameters:
            self.inner.state[parameter]["step"].fill_(float(step))

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        """Take over the moments that `state` returned after `step` updates."""
        self.at(step)
        for key, moment in self.moments.items():
            part = {name: named[f"{name}.{key}"] for name in self.flat.slots}
            self.flat.load(moment, part)


# The preconditioner of NoRA+ (arXiv 2410.18965) and of Riemannian preconditioned LoRA (arXiv 2402.02347).


@torch.no_grad()
def precondition(
    adapted: Mapping[str, AdaptedWeight], epsilon: float = 1e-6, unit: bool = True
) -> None:
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
    """Return (rows rows^T + eps I)^-1 right in float64, for `rows` ((E x) r x k) and `right` ((E x) r x l)."""
    wide = rows.double()
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    # cholesky_ex does not check for errors, which would wait for the device. A failure makes the norm of the gradient
    # not finite, and each step checks this norm.
    return torch.cholesky_solve(right.double(), torch.linalg.cholesky_ex(gram).L)


def _unit(gradient: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(gradient, keepdim=True)
    return gradient / torch.where(norm > 0, norm, 1.0)
