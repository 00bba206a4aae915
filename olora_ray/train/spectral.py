"""The spectral step: each factor takes the steepest step whose change of the weight has a given spectral norm.

With A = A0 + dA (r x n), B = B0 + dB (m x r), momenta M_A and M_B of their gradients, and polar(X) = X (X^T X)^(-1/2):

    dB -= e polar(M_B S_A^-1) S_A^-1     S_A = (A A^T)^(1/2)     so that the weight moves by e s in the spectral norm
    dA -= e S_B^-1 polar(S_B^-1 M_A)     S_B = (B^T B)^(1/2)     polar of r x n: orthonormal rows
    e = lr (root mean square singular value of the weight) / s

So a step moves B A alike for every pair (B R^-1, R A), and the learning rate is a share of the weight's size, whatever
the method, the rank and alpha are. Both factors need full rank, which plain LoRA's B = 0 has not: there the move of A
is limited to a share of A, by S_B^2 = B^T B + (KAPPA e)^2 (A A^T)^-1, which keeps the property.

The momenta follow the factors: a gradient G_B = G A^T of a step before belongs to the A of that step, so it becomes
G_B (A A^T)^-1 A A'^T for the new A'.

Related: LoRA-Muon, LoRA-TSD (steps), LoRA-RITE (arXiv 2410.20625: moments that follow the factors), Muon (polar).
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.config.schema import Train
from olora_ray.train.optim import FlatAdapters

MOMENTUM = 0.9
KAPPA = 3.0
WEAKEST = 1e-4
"""Directions of a momentum whose square is below this share of the mean square move less than the others."""
DEPENDENT = 1e-6
"""The same of A and B. It is far above the rounding errors of a product in float32."""
AT_ONCE = 2**20
"""Numbers of layers of one shape that are computed together."""


class Spectral:
    """The spectral step on the flat vector, with Nesterov's momentum; `sizes` are `weight_sizes` of the weights."""

    def __init__(
        self, flat: FlatAdapters, adapted: Mapping[str, AdaptedWeight], config: Train, sizes: Mapping[str, Tensor]
    ) -> None:
        self.flat, self.adapted, self.config = flat, adapted, config
        self.momentum = torch.zeros_like(flat.vector)
        self.sizes = {name: size.to(flat.vector.device) for name, size in sizes.items() if name in adapted}
        self.count = 0
        alike: dict[tuple[int, torch.Size, torch.Size], list[str]] = defaultdict(list)
        for name, layer in adapted.items():
            alike[layer.da.dim(), layer.da.shape[-2:], layer.db.shape[-2:]].append(name)
        self.groups = [part for names in alike.values() for part in self._parts(names)]

    def _parts(self, names: list[str]) -> list[list[str]]:
        parts: list[list[str]] = []
        numbers = AT_ONCE
        for name in names:
            more = self.adapted[name].da.numel() + self.adapted[name].db.numel()
            if numbers + more > AT_ONCE:
                parts, numbers = [*parts, []], 0
            parts[-1].append(name)
            numbers += more
        return parts

    @torch.no_grad()
    def step(self, lr: float, norm: float | None = None) -> float:
        """Clip and update with learning rate `lr` (of dA); return the norm before clipping. `norm` as in AdamW."""
        norm = float(self.flat.grad.norm()) if norm is None else norm
        if self.config.clip is not None and norm > self.config.clip:
            self.flat.grad.mul_(self.config.clip / norm)
        self.count += 1
        self.momentum.lerp_(self.flat.grad, 1 - MOMENTUM)
        self.flat.vector.mul_(1 - lr * self.config.weight_decay)
        for names in self.groups:
            self._move(names, lr)
        return norm

    def _move(self, names: list[str], lr: float) -> None:
        layers = [self.adapted[name] for name in names]
        a = _flat([layer.a0 + layer.da for layer in layers])
        b = _flat([layer.db if layer.b0 is None else layer.b0 + layer.db for layer in layers]).mT
        grad_a, old_a = (self._of(vector, names, "da") for vector in (self.flat.grad, self.momentum))
        grad_b, old_b = (self._of(vector, names, "db").mT for vector in (self.flat.grad, self.momentum))
        far = torch.cat([self.sizes[name].reshape(-1) for name in names])[:, None, None] * (lr / layers[0].scale)
        if layers[0].da.dim() > 2:  # an expert without tokens stands still
            far = far * grad_b.any(2, True).any(1, True)
        root_a, of_b = _root(_gram(a)), _gram(b)
        limit = (KAPPA * far.double()).square() * torch.cholesky_inverse(root_a)
        step_b = self._step(-far * self.config.lr_ratio, root_a, grad_b, old_b)
        step_a = self._step(-far, _root(of_b + limit), grad_a, old_a)
        for root, other, step, old in ((root_a, a, step_a, old_b), (_root(of_b), b, step_b, old_a)):
            turned = torch.cholesky_solve((other @ step.mT).double(), root).to(old.dtype)
            old += turned.mT @ old
        start = 0
        for name, layer in zip(names, layers, strict=True):
            rows = slice(start, start := start + layer.da[..., 0, 0].numel())
            layer.da += step_a[rows].view_as(layer.da)
            layer.db += step_b[rows].mT.reshape(layer.db.shape)
            self.flat.view(self.momentum, f"{name}.da").copy_(old_a[rows].view_as(layer.da))
            self.flat.view(self.momentum, f"{name}.db").copy_(old_b[rows].mT.reshape(layer.db.shape))

    def _of(self, vector: Tensor, names: list[str], part: str) -> Tensor:
        return _flat([self.flat.view(vector, f"{name}.{part}") for name in names])

    def _step(self, far: Tensor, root: Tensor, grad: Tensor, momentum: Tensor) -> Tensor:
        share = (1 - MOMENTUM ** (self.count + 1)) / MOMENTUM * (1 - MOMENTUM) / (1 - MOMENTUM**self.count)
        ahead = momentum.add(grad, alpha=share)  # Nesterov's, but for its length
        return (far * _shaped(root, ahead)) @ ahead

    def state(self, copied_to: str | None = None) -> dict[str, Tensor]:
        """Return momenta and sizes as named tensors; `copied_to` as in AdamW."""
        momentum = self.momentum.to(copied_to, copy=True) if copied_to else self.momentum
        momenta = {f"{name}.momentum": part for name, part in self.flat.named(momentum).items()}
        return momenta | {f"{name}.size": size.cpu() for name, size in self.sizes.items()}

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        """Take over what `state` returned after `step` updates."""
        self.count = step
        self.flat.load(self.momentum, {name: named[f"{name}.momentum"] for name in self.flat.slots})
        self.sizes = {name: named[f"{name}.size"].to(self.momentum.device) for name in self.adapted}


def _flat(parts: list[Tensor]) -> Tensor:
    """Return all layers, and all experts of stacks, behind each other: L x rows x columns."""
    return torch.cat([part.reshape(-1, *part.shape[-2:]) for part in parts])


def _gram(rows: Tensor) -> Tensor:
    return (rows @ rows.mT).double()


def _root(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a gram matrix, without a check that waits for the device."""
    return torch.linalg.cholesky_ex(_lifted(gram, DEPENDENT)).L


def _lifted(gram: Tensor, share: float) -> Tensor:
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    smallest = torch.finfo(torch.float32).tiny  # so that zeros stay finite
    return gram + torch.diag_embed((share * mean + smallest)[..., None].expand(gram.shape[:-1]))


def _shaped(root: Tensor, momentum: Tensor) -> Tensor:
    """Return P (L x r x r): P M is the step of the momentum M (L x r x n) in the metric C = root root^T.

    P = root^-T (root^-1 M M^T root^-T)^(-1/2) root^-1.
    """
    half = torch.linalg.solve_triangular(root, _gram(momentum), upper=False)
    moved = torch.linalg.solve_triangular(root, half.mT, upper=False)
    inner = torch.linalg.solve_triangular(root.mT, _inverse_root(moved.float()).double(), upper=True)
    return torch.linalg.solve_triangular(root, inner, upper=False, left=False).to(momentum.dtype)


def _inverse_root(gram: Tensor) -> Tensor:
    """Return (gram + WEAKEST mean I)^(-1/2), by Newton-Schulz iterations: products only, for all layers at once.

    Each iteration is scaled for eigenvalues from the least possible one to 1 (Chen and Chow, 2014).
    """
    lifted = _lifted(gram, WEAKEST)
    size = lifted.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    root, inverse = lifted / size, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    least = (WEAKEST / gram.shape[-1]) ** 0.5
    while least < 1 - 1e-4:
        scale = (3 / (1 + least + least**2)) ** 0.5
        turn = (-0.5 * scale**3) * (inverse @ root)
        turn.diagonal(dim1=-2, dim2=-1).add_(1.5 * scale)
        root, inverse = root @ turn, turn @ inverse
        least = 0.5 * scale * least * (3 - (scale * least) ** 2)
    return inverse / size.sqrt()
