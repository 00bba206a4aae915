"""Factors from singular vectors: W = U S V^T, and from some of them A~ = sqrt(S) V^T and B~ = U sqrt(S).

The vectors of the smaller side are eigenvectors of the smaller Gram matrix (W W^T or W^T W), in float64; the vectors of
the other side follow by a product with W. This resolves singular values down to sigma_max sqrt(max(m, n) eps), about
1e-6 of the largest. The sign of each vector is chosen so that its largest entry is positive.
"""

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors


def exact_cost(m: int, n: int, rank: int) -> int:
    small, large = sorted((m, n))
    return small**2 * large + 9 * small**3 + m * n * rank


def exact(weight: Tensor, rank: int, smallest: bool = False) -> Factors:
    """Return A~ (r x n) and B~ (m x r) of the `rank` largest or smallest singular values, the most extreme first.

    `weight` is m x n in float32 with r <= min(m, n), or E x m x n for a stack. `full_rank` is False if a chosen
    singular value is too small for its vectors to be known. A weight with NaN or infinite values gives NaN.
    """
    wide = weight.shape[-2] <= weight.shape[-1]
    w = (weight if wide else weight.mT).double()
    values, vectors = _eigen(w @ w.mT)
    if not smallest:
        vectors = vectors.flip(-1)
    left = signed(vectors[..., :rank])
    right = left.mT @ w
    sizes = right.norm(dim=-1)
    roots = sizes.sqrt()
    # B~ A~ is the projection of w onto the left singular vectors.
    a = right / torch.where(roots > 0, roots, 1.0)[..., None]
    b = left * roots[..., None, :]
    if not wide:
        a, b = b.mT, a.mT
    limit = values[..., -1].clamp_min(0) * max(weight.shape[-2:]) * torch.finfo(w.dtype).eps
    known = bool((sizes.amin(-1) > limit.sqrt()).all())
    a0, b0 = (part.to(weight.dtype).contiguous() for part in (a, b))
    return Factors(a0, b0, full_rank=known)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    # eigh raises for NaN and infinite values. NaN instead lets the caller name the layer and the model.
    if not torch.isfinite(gram).all():
        return torch.full_like(gram[..., 0], torch.nan), torch.full_like(gram, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def signed(vectors: Tensor) -> Tensor:
    """Return the columns with signs by which the largest entry of each is positive."""
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    signs = vectors.gather(-2, largest).sign()
    return vectors * torch.where(signs == 0, 1.0, signs)  # 0 only for a column of zeros
