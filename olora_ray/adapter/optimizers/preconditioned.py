"""AdamW on preconditioned gradients, as in NoRA+ (arXiv 2410.18965) and Riemannian preconditioned LoRA (2402.02347).

grad A <- (B^T B + eps I)^-1 grad A     grad B <- grad B (A A^T + eps I)^-1     each scaled to length 1
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.adapter.optimizers.adamw import AdamW
from olora_ray.adapter.optimizers.optimizer import Optimizer, a_of, alike, b_of, inverse_of


class Preconditioned(AdamW):
    def prepare(self) -> None:
        precondition(self.flat.layers)


@torch.no_grad()
def precondition(
    adapted: Mapping[str, AdaptedWeight], epsilon: float = 1e-6, whole: bool | None = None
) -> None:
    """Replace the gradients of all dA and dB in place; each has norm 1 afterwards, or is zero.

    `whole`: all layers of one shape are computed together; None: on GPUs only.
    """
    # On CPUs products of several matrices differ from those of one in the last bits, so resumed runs would change.
    if whole is None:
        whole = next(iter(adapted.values())).da.device.type != "cpu"
    groups = alike(adapted) if whole else [[name] for name in adapted]
    for names in groups:
        layers = [adapted[name] for name in names]
        a = _joined(a_of(layers))
        b = _joined(b_of(layers))
        of_a = [layer.da.grad for layer in layers if layer.da.grad is not None]
        of_b = [layer.db.grad for layer in layers if layer.db.grad is not None]
        new_a = _unit(_solve(b.mT, _joined(of_a), epsilon))
        new_b = _unit(_solve(a, _joined(of_b).mT, epsilon).mT)
        torch._foreach_copy_(of_a, new_a.view(-1, *layers[0].da.shape).unbind())
        torch._foreach_copy_(of_b, new_b.view(-1, *layers[0].db.shape).unbind())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts))


def _solve(rows: Tensor, right: Tensor, epsilon: float) -> Tensor:
    """Return (rows rows^T + eps I)^-1 right in float64, for `rows` ((E x) r x k) and `right` ((E x) r x l)."""
    wide = rows.double()
    gram = wide @ wide.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    # cholesky_ex does not check for errors, which would wait for the device. A failure makes the norm of the gradient
    # not finite, and each step checks this norm.
    root = torch.linalg.cholesky_ex(gram).L
    if root.device.type == "cpu":
        return torch.cholesky_solve(right.double(), root)
    return inverse_of(root) @ right.double()


def _unit(gradient: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(gradient, keepdim=True)
    return gradient / torch.where(norm > 0, norm, 1.0)


OPTIMIZER = Optimizer("preconditioned", Preconditioned)
