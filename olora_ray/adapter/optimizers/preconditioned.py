"""AdamW on preconditioned gradients, as in NoRA+ (arXiv 2410.18965) and Riemannian preconditioned LoRA (2402.02347).

grad A <- (B^T B + eps I)^-1 grad A     grad B <- grad B (A A^T + eps I)^-1     each scaled to length 1
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.adapter.optimizers.adamw import AdamW
from olora_ray.adapter.optimizers.optimizer import Optimizer


class Preconditioned(AdamW):
    def prepare(self) -> None:
        precondition(self.flat.layers)


@torch.no_grad()
def precondition(
    adapted: Mapping[str, AdaptedWeight], epsilon: float = 1e-6, unit: bool = True
) -> None:
    """Replace the gradients of all dA and dB in place; with `unit` each has norm 1 afterwards, or is zero."""
    for layer in adapted.values():
        a = layer.a0 + layer.da
        b = layer.db if layer.b0 is None else layer.b0 + layer.db
        grad_a = layer.da.grad
        grad_b = layer.db.grad
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


OPTIMIZER = Optimizer("preconditioned", Preconditioned)
