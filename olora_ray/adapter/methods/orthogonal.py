"""Orthogonal initialisation: random A0 and B0 whose product is zero (as PEFT's init_lora_weights="orthogonal").

X ~ N(0, 1)^(r x r), Q of its QR; the rows 0, 2, .. of Q go into A0, the rows 1, 3, .. into B0:

    A0 = (G1 Q[0::2])^T / 10       G1 ~ N(0, 1)^(n x r/2)
    B0 = G2^T Q[1::2] / 10         G2 ~ N(0, 1)^(r/2 x m)
"""

from functools import partial

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options, for_each_expert


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A0 (r x n) and B0 (m x r), of rank r / 2 each, with B0 A0 = 0 except for rounding.

    Only the shape of `weight` matters. The rank is even. Not a prefix over ranks: Q is a rotation of r dimensions.
    """
    m, n = weight.shape[-2:]
    pair = for_each_expert(weight, seed, partial(_pair, m, n, rank))
    return Factors(pair[..., :n, :].mT.contiguous(), pair[..., n:, :].contiguous())


def _pair(m: int, n: int, rank: int, seed: int) -> Tensor:
    """Return A0^T above B0, (n + m) x r."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a0 = torch.randn(n, rank // 2, generator=generator) @ q[0::2]
    b0 = torch.randn(rank // 2, m, generator=generator).T @ q[1::2]
    return torch.cat([a0, b0]) / 10.0


METHOD = Method(
    name="orthogonal",
    source="PEFT 0.21, init_lora_weights='orthogonal'; no paper",
    about="Random A0 and B0 on complementary halves of r dimensions, so that B0 A0 = 0 although neither is zero.\n"
    "Needs an even rank; does not use the weight.",
    factors=factors,
    cost=lambda m, n, rank: rank**3 + (m + n) * rank**2,
    prefix=False,
    rank_multiple=2,
)
