"""The spectral step: each factor takes the steepest step whose change of the weight has a given spectral norm.

With A = A0 + dA (r x n), B = B0 + dB (m x r), momenta M_A and M_B of their gradients, and polar(X) = X (X^T X)^(-1/2):

    dB -= e polar(M_B S_A^-1) S_A^-1     S_A = (A A^T)^(1/2)     so that the weight moves by e s in the spectral norm
    dA -= e S_B^-1 polar(S_B^-1 M_A)     S_B = (B^T B)^(1/2)     polar of r x n: orthonormal rows
    e = lr (root mean square singular value of the weight) / s

So a step moves B A alike for every pair (B R^-1, R A), and the learning rate is a share of the weight's size, whatever
the method, the rank and alpha are. Both factors need full rank, which plain LoRA's B = 0 has not: there the move of A
is limited to a share of A, by S_B^2 = B^T B + (KAPPA e)^2 (A A^T)^-1, which keeps the property.

The momenta are kept in the coordinates of dA and dB. Rewriting them for the new A and B after each step changed no
loss (docs/generated/settings_trials.jsonl), because a step changes the factors little.

Related: LoRA-Muon and LoRA-TSD (steps for pairs of factors), LoRA-RITE (arXiv 2410.20625), Muon (polar).
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from olora_ray.adapter.optimizers.optimizer import FlatAdapters, Optimizer, Settings, Update

MOMENTUM = 0.9
KAPPA = 3.0
WEAKEST = 1e-4
"""Directions of a momentum whose square is below this share of the mean square move less than the others."""
RATE = 0.004
"""Peak rate of a training of 20 steps at rank 16 (docs/generated/settings.jsonl: tuned rates of four starts on three
tasks, 0.0015 to 0.006)."""
AT_ONCE = 2**20
"""Numbers of layers of one shape that are computed together."""


class Spectral(Update):
    """The spectral step on the flat vector, with Nesterov's momentum; `sizes` are `weight_sizes` of the weights."""

    keys = ("momentum",)

    def __init__(
        self, flat: FlatAdapters, config: Settings, sizes: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(flat, config, sizes)
        self.adapted = flat.layers
        self.momentum = self.moments["momentum"]
        self.sizes = {
            name: size.to(flat.vector.device)
            for name, size in self.sizes.items()
            if name in self.adapted
        }
        alike: dict[tuple[torch.Size, torch.Size], list[str]] = defaultdict(list)
        for name, layer in self.adapted.items():
            alike[layer.da.shape[-2:], layer.db.shape[-2:]].append(name)
        self.groups: list[list[str]] = []
        for names in alike.values():
            self.groups += self._parts(names)

    def _parts(self, names: list[str]) -> list[list[str]]:
        parts: list[list[str]] = []
        numbers = AT_ONCE
        for name in names:
            more = self.adapted[name].da.numel() + self.adapted[name].db.numel()
            if numbers + more > AT_ONCE:
                parts = [*parts, []]
                numbers = 0
            parts[-1].append(name)
            numbers += more
        return parts

    def update(self, lr: float) -> None:
        far = {}
        for name, layer in self.adapted.items():
            gradient = self.flat.view(self.flat.grad, f"{name}.db")
            used: Tensor | float = 1.0
            if gradient.dim() > 2:  # an expert that has seen no token stands still
                used = gradient.flatten(1).any(1)
            far[name] = self.sizes[name] * used * (lr / layer.scale)
        self.momentum.lerp_(self.flat.grad, 1 - MOMENTUM)
        # Nesterov's momentum, but for its length.
        share = (
            (1 - MOMENTUM ** (self.count + 1))
            / MOMENTUM
            * (1 - MOMENTUM)
            / (1 - MOMENTUM**self.count)
        )
        self.flat.grad.mul_(share).add_(self.momentum)
        self.flat.vector.mul_(1 - lr * self.config.weight_decay)
        for names in self.groups:
            self._move(names, torch.cat([far[name] for name in names])[:, None, None])

    def _move(self, names: list[str], far: Tensor) -> None:
        layers = [self.adapted[name] for name in names]
        a = _flat([layer.a0 + layer.da for layer in layers])
        b = _flat([layer.db if layer.b0 is None else layer.b0 + layer.db for layer in layers]).mT
        of_a = _flat([self.flat.view(self.flat.grad, f"{name}.da") for name in names])
        of_b = _flat([self.flat.view(self.flat.grad, f"{name}.db") for name in names])
        root_a = _root(a)
        limit = (KAPPA * far.double()).square() * torch.cholesky_inverse(root_a)
        step_b = _step(far * self.config.lr_ratio, root_a, of_b.mT)
        step_a = _step(far, _root(b, limit), of_a)
        start = 0
        for name, layer in zip(names, layers, strict=True):
            stop = start + len(self.sizes[name])
            layer.da.add_(step_a[start:stop].view_as(layer.da))
            layer.db.add_(step_b[start:stop].mT.reshape(layer.db.shape))
            start = stop

    def state(self, copied_to: str | None = None) -> dict[str, Tensor]:
        """Return momenta and sizes as named tensors; `copied_to` as in Update."""
        sizes = {f"{name}.size": size.cpu() for name, size in self.sizes.items()}
        return super().state(copied_to) | sizes

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        super().load(named, step)
        self.sizes = {name: named[f"{name}.size"].to(self.momentum.device) for name in self.adapted}


def _flat(parts: list[Tensor]) -> Tensor:
    """Return all layers, and all experts of stacks, behind each other: L x rows x columns."""
    return torch.cat([part.reshape(-1, *part.shape[-2:]) for part in parts])


def _root(rows: Tensor, more: Tensor | float = 0.0) -> Tensor:
    """Return the Cholesky factor of rows rows^T + more in float64, without a check that waits for the device."""
    # In float32 the rounding errors would be larger than what `_lifted` adds, if the rows are dependent.
    wide = rows.double()
    factor: Tensor = torch.linalg.cholesky_ex(_lifted(wide @ wide.mT + more, 1e-6)).L
    return factor


def _lifted(gram: Tensor, share: float) -> Tensor:
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    smallest = torch.finfo(torch.float32).tiny  # so that zeros stay finite
    return gram + torch.diag_embed((share * mean + smallest)[..., None].expand(gram.shape[:-1]))


def _step(far: Tensor, root: Tensor, momentum: Tensor) -> Tensor:
    """Return -far root^-T polar(root^-1 M), the step of a momentum M (L x r x n) in the metric root root^T."""
    # Not one r x r matrix times M: if the rows are dependent, its numbers differ by more than float32 holds.
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye, upper=False).to(momentum.dtype)
    along = inverse @ momentum
    step: Tensor = (-far * inverse.mT @ _inverse_root(along @ along.mT)) @ along
    return step


def _inverse_root(gram: Tensor) -> Tensor:
    """Return (gram + WEAKEST mean I)^(-1/2), by Newton-Schulz iterations: products only, for all layers at once.

    Each iteration is scaled for eigenvalues from the least possible one to 1 (Chen and Chow, 2014).
    """
    lifted = _lifted(gram, WEAKEST)
    size = lifted.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    root = lifted / size
    inverse = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    least = (WEAKEST / gram.shape[-1]) ** 0.5
    while least < 1 - 1e-4:
        scale = (3 / (1 + least + least**2)) ** 0.5
        turn = (-0.5 * scale**3) * (inverse @ root)
        turn.diagonal(dim1=-2, dim2=-1).add_(1.5 * scale)
        root = root @ turn
        inverse = turn @ inverse
        least = 0.5 * scale * least * (3 - (scale * least) ** 2)
    return inverse / size.sqrt()


# A step is even in all directions, so its Frobenius norm grows with the root of their number.
OPTIMIZER = Optimizer(
    "spectral", Spectral, sizes=True, rate=lambda rank: float(RATE * (16 / rank) ** 0.5)
)
