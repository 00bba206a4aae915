"""PiSSA: principal singular values and vectors of the weight (arXiv 2404.02948), exactly."""

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import singular
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A~ = sqrt(S_r) V_r^T (r x n) and B~ = U_r sqrt(S_r) (m x r), the largest singular value first.

    `weight` is m x n in float32 with r <= min(m, n), or E x m x n; `seed` is not used.
    """
    return singular.exact(weight, rank)


def root_of_scale(options: Options) -> tuple[float, float]:
    """Return the powers of s for A0 = A~ / sqrt(s), B0 = B~ / sqrt(s): then s B0 A0 does not depend on s."""
    return 0.5, 0.5


METHOD = Method(
    name="pissa",
    source="arXiv 2404.02948",
    about="s B0 A0 is the best approximation of W of rank r: its r largest singular values, shared by B0 and A0.\n"
    "Exact, from eigenvectors of the smaller Gram matrix in float64; for layers with a shorter side above about\n"
    "4,096 on CPUs, pissa_fast takes far less time.",
    factors=factors,
    cost=singular.exact_cost,
    scale_powers=root_of_scale,
)


# PiSSA by a randomised SVD (arXiv 2404.02948; subspace iteration: arXiv 0909.4061, algorithm 4.4).


OVERSAMPLING = 4
"""Dimensions of the searched space per rank."""
ITERATIONS = 8


def fast_factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return pissa's factors approximately. Not a prefix over ranks: the searched space grows with the rank."""
    m, n = weight.shape[-2:]
    size = min(OVERSAMPLING * rank, m, n)
    z = _start(weight, size, seed)
    q = _orthonormal(weight @ z)
    for _ in range(ITERATIONS):
        z = _orthonormal(weight.mT @ q)
        q = _orthonormal(weight @ z)
    return singular.within(weight, q, rank)


def _start(weight: Tensor, size: int, seed: int) -> Tensor:
    n, experts = weight.shape[-1], weight.shape[0] if weight.dim() == 3 else 1
    drawn = [torch.randn(n, size, generator=torch.Generator().manual_seed(seed + expert)) for expert in range(experts)]
    return (torch.stack(drawn) if weight.dim() == 3 else drawn[0]).to(weight)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


FAST = Method(
    name="pissa_fast",
    source="arXiv 2404.02948; arXiv 0909.4061, algorithm 4.4",
    about="pissa by a randomised SVD: 8 iterations in a space of 4 r dimensions, with a seed for each layer.\n"
    "For layers that are too large for pissa.",
    factors=fast_factors,
    cost=lambda m, n, rank: (2 * ITERATIONS + 2) * m * n * min(OVERSAMPLING * rank, m, n),
    prefix=False,
    scale_powers=root_of_scale,
)
