"""OLoRA: orthonormal start from the QR decomposition of the weight (arXiv 2406.01775, algorithm 1).

The paper takes the first r columns of Q and rows of R of the full QR of W. Those columns depend only on W[:, :r], and
R[:r] = Q1^T W. So the QR of an m x r slice gives the same factors (same Householder reflectors, same signs) in O(m r^2
+ m n r) instead of O(m n min(m, n)) operations.
"""

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return B0 = QR(W[:, :r]).Q (m x r, orthonormal columns) and A0 = B0^T W (r x n).

    `weight` is m x n in float32 with r <= min(m, n), or E x m x n for a stack of experts, each with its own QR; `seed`
    is not used. If the slice is rank-deficient, the Householder Q is still orthonormal and the start still exact, but
    some of its columns are arbitrary: then `full_rank` is False.
    """
    # float64 costs little for a slice, and makes B0 orthonormal to float32's last bit.
    q1, r1 = torch.linalg.qr(weight[..., :rank].double())
    b0 = q1.to(weight.dtype)
    pivots = r1.diagonal(dim1=-2, dim2=-1).abs()
    tolerance = pivots.amax(-1) * max(weight.shape[-2], rank) * torch.finfo(weight.dtype).eps
    return Factors(
        b0.mT @ weight, b0.contiguous(), full_rank=bool((pivots.amin(-1) > tolerance).all())
    )


METHOD = Method(
    name="olora",
    source="arXiv 2406.01775, algorithm 1",
    about="B0 and A0 are the first r columns of Q and rows of R in W = Q R: B0 is orthonormal, B0 A0 projects W.\n"
    "Computed from the QR of W's first r columns, which gives the same factors and takes seconds for any model.",
    factors=factors,
    cost=lambda m, n, rank: m * rank**2 + m * n * rank,
)
