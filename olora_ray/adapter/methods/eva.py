"""EVA: A0 spans the directions in which a layer's inputs vary most (arXiv 2410.07170, section 3).

The rows X (T x n) are a layer's inputs at T supervised tokens, mu their mean:

    X - mu = U S V^T     A0 = V[:r]  (r x n, orthonormal rows)     B0 = 0

The paper's text takes the SVD of the activations; its code and PEFT's subtract the mean first, and so does this code.
Ranks are redistributed (section 3.2): every layer offers its first rho r components, each with its share of the layer's
variance, S_i^2 / sum_j S_j^2; the (layers x r) largest shares of all layers are kept. The scale s of every layer stays
the scale of rank r, as in the paper, whose alpha_i is alpha r_i / r.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options
from olora_ray.adapter.methods.singular import signed


@dataclass(frozen=True)
class Components:
    vectors: Tensor
    """k x n, float64, orthonormal rows, the largest component first; the largest entry of each row is positive."""
    shares: tuple[float, ...]
    """Each component's share of the variance."""


def principal(rows: Tensor, count: int) -> Components:
    """Return the first `count` components of rows (T x n), in float64; fewer if the rows vary in fewer directions.

    Exact: from the eigenvectors of the smaller of the two Gram matrices, T x T or n x n.
    """
    x = rows.double()
    x = x - x.mean(0)
    dual = x.shape[0] < x.shape[1]
    gram = x @ x.mT if dual else x.mT @ x
    total = gram.trace()
    values, vectors = (part.flip(-1)[..., :count] for part in torch.linalg.eigh(gram))
    known = int((values > total * max(x.shape) * torch.finfo(x.dtype).eps).sum())
    values = values[:known]
    vectors = vectors[:, :known]
    if dual:
        vectors = torch.linalg.qr(x.mT @ vectors).Q
    return Components(signed(vectors).mT, tuple((values / total).tolist()))


def factors(rows: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A0 (r x n) for a layer's inputs (T x n), without redistribution; `seed` is not used."""
    return Factors(principal(rows, rank).vectors.to(torch.float32), None)


METHOD = Method(
    name="eva",
    source="arXiv 2410.07170, section 3",
    about="A0 spans the directions in which the layer's inputs vary most at supervised tokens of the data; B0 = 0.\n"
    "Layers whose components explain more of their inputs get more rank: up to rho x rank, with the same total.",
    factors=factors,
    cost=lambda m, n, rank: float(min(n, 1024) ** 2 * (n + min(n, 1024))),  # of as many tokens
    needs="activations",
    prefix=False,
    has_b0=False,
)
