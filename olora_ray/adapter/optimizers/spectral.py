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
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from olora_ray.adapter.optimizers.optimizer import (
    FlatAdapters,
    Optimizer,
    Settings,
    Update,
    a_of,
    alike,
    b_of,
    inverse_of,
)

MOMENTUM = 0.9
KAPPA = 3.0
WEAKEST = 1e-4
"""Directions of a momentum whose square is below this share of the mean square move less than the others."""
RATE = 0.004
"""Peak rate of a training of 20 steps at rank 16 (docs/generated/settings.jsonl: tuned rates of four starts on three
tasks, 0.0015 to 0.006)."""
AT_ONCE = 2**20
"""Numbers of layers of one shape that a CPU computes together, because they fit its cache."""


class Spectral(Update):
    """The spectral step on the flat vector, with Nesterov's momentum; `sizes` are `weight_sizes` of the weights."""

    keys = ("momentum",)

    def __init__(
        self,
        flat: FlatAdapters,
        config: Settings,
        sizes: Mapping[str, Tensor] | None = None,
        whole: bool | None = None,
    ) -> None:
        """Prepare the momentum. `whole`: all layers of a rank are computed together; None: on GPUs only."""
        super().__init__(flat, config, sizes)
        self.momentum = self.moments["momentum"]
        self.sizes = {
            name: size.to(flat.vector.device)
            for name, size in self.sizes.items()
            if name in flat.layers
        }
        if whole is None:
            whole = flat.vector.device.type != "cpu"
        self.rounds: list[list[list[str]]] = []
        """Groups of layers of one shape, by the rounds in which they are computed."""
        if whole:
            # A kernel for few layers takes a GPU as long as one for all.
            ranks: dict[int, list[list[str]]] = defaultdict(list)
            for names in alike(flat.layers):
                ranks[flat.layers[names[0]].da.shape[-2]].append(names)
            self.rounds = list(ranks.values())
        else:
            for names in alike(flat.layers):
                self.rounds += [[part] for part in self._parts(names)]

    def _parts(self, names: list[str]) -> list[list[str]]:
        parts: list[list[str]] = []
        numbers = AT_ONCE
        for name in names:
            layer = self.flat.layers[name]
            more = layer.da.numel() + layer.db.numel()
            if numbers + more > AT_ONCE:
                parts = [*parts, []]
                numbers = 0
            parts[-1].append(name)
            numbers += more
        return parts

    def update(self, lr: float) -> None:
        # Before the momentum: an expert that has seen no token in this step stands still.
        far = [[self._far(names, lr) for names in groups] for groups in self.rounds]
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
        for groups, each in zip(self.rounds, far, strict=True):
            self._move(groups, torch.cat(each)[:, None, None])

    def _far(self, names: list[str], lr: float) -> Tensor:
        """Return how far the weight of each layer or expert moves: one number per weight, divided by the scale."""
        first = self.flat.layers[names[0]]
        sizes = torch.cat([self.sizes[name] for name in names])
        if first.db.dim() > 2:
            sizes = sizes * self._gradient(names, "db").flatten(1).any(1)
        return sizes * (lr / first.scale)

    def _move(self, groups: list[list[str]], far: Tensor) -> None:
        layers = [[self.flat.layers[name] for name in names] for names in groups]
        root_a = _root(torch.cat([_gram(_flat(a_of(each))) for each in layers]))
        limit = (KAPPA * far.double()).square() * inverse_of(root_a)
        root_b = _root(torch.cat([_gram(_flat(b_of(each)).mT) for each in layers]) + limit)
        of_b = [self._gradient(names, "db").mT for names in groups]
        of_a = [self._gradient(names, "da") for names in groups]
        steps = _steps(
            torch.cat([far * self.config.lr_ratio, far]), torch.cat([root_a, root_b]), of_b + of_a
        )
        for names in groups:
            self._add(names, "db", next(steps).mT)
        for names in groups:
            self._add(names, "da", next(steps))

    def _gradient(self, names: list[str], part: str) -> Tensor:
        return _flat([self.flat.view(self.flat.grad, f"{name}.{part}") for name in names])

    def _add(self, names: list[str], part: str, change: Tensor) -> None:
        slots = [self.flat.slots[f"{name}.{part}"] for name in names]
        sizes = [len(self.sizes[name]) for name in names]
        parts = change.contiguous().split(sizes)
        torch._foreach_add_(
            slots, [each.view_as(slot) for each, slot in zip(parts, slots, strict=True)]
        )

    def state(self, copied_to: str | None = None) -> dict[str, Tensor]:
        """Return momenta and sizes as named tensors; `copied_to` as in Update."""
        sizes = {f"{name}.size": size.cpu() for name, size in self.sizes.items()}
        return super().state(copied_to) | sizes

    def load(self, named: Mapping[str, Tensor], step: int) -> None:
        super().load(named, step)
        self.sizes = {
            name: named[f"{name}.size"].to(self.momentum.device) for name in self.flat.layers
        }


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """Return all layers, and all experts of stacks, behind each other: L x rows x columns."""
    return torch.cat([part.reshape(-1, *part.shape[-2:]) for part in parts])


def _gram(rows: Tensor) -> Tensor:
    """Return rows rows^T in float64."""
    # In float32 the rounding errors would be larger than what `_lifted` adds, if the rows are dependent.
    wide = rows.double()
    return wide @ wide.mT


def _root(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a Gram matrix, without a check that waits for the device."""
    factor: Tensor = torch.linalg.cholesky_ex(_lifted(gram, 1e-6)).L
    return factor


def _lifted(gram: Tensor, share: float) -> Tensor:
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    smallest = torch.finfo(torch.float32).tiny  # so that zeros stay finite
    return gram + torch.diag_embed((share * mean + smallest)[..., None].expand(gram.shape[:-1]))


def _steps(far: Tensor, root: Tensor, momenta: list[Tensor]) -> Iterator[Tensor]:
    """Yield -far root^-T polar(root^-1 M), the steps of momenta M (L x r x n) in the metric root root^T.

    `far` and `root` have the layers of all momenta behind each other.
    """
    sizes = [len(momentum) for momentum in momenta]
    # Not one r x r matrix times M: if the rows are dependent, its numbers differ by more than float32 holds.
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye, upper=False).to(momenta[0].dtype)
    along = [each @ momentum for each, momentum in zip(inverse.split(sizes), momenta, strict=True)]
    turn = -far * inverse.mT @ _inverse_root(torch.cat([each @ each.mT for each in along]))
    for each, turned in zip(along, turn.split(sizes), strict=True):
        yield turned @ each


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
