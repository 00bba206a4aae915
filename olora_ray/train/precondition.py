"""The preconditioner of NoRA+ (arXiv 2410.18965) and of Riemannian preconditioned LoRA (arXiv 2402.02347).

    gA <- (B^T B + eps I)^-1 gA / ||.||_F        gB <- gB (A A^T + eps I)^-1 / ||.||_F

with A = A0 + dA and B = B0 + dB, for each layer, and for each expert of a stack. It is taken of the summed gradient,
before clipping, and keeps no state. The division by the norm is NoRA+'s, whose code leaves gA out in the first step: it
is zero there, as B is, and stays zero here. All workers hold the same factors and gradients and compute the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight

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
