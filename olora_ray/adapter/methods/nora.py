"""NoRA: A0 is a random mixture of the weight's rows, B0 = 0 (arXiv 2410.18965; formula of the authors' code).

    A0 = sigma / s  Omega W        Omega ~ N(0, 1)^(r x m)

A row of A0 is about sigma / s times as long as all of W (its Frobenius norm), so with the same sigma the size of A0
depends on the model and the scale. sigma "matched" gives each row the length of plain LoRA's, 1 / sqrt(3), whatever W
and s are. NoRA+ is this method with `train.optimizer: preconditioned`.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options, for_each_expert

ROW = 1 / math.sqrt(3)
"""Length of a row of plain LoRA's A0 for any width: n numbers of variance 1 / (3 n)."""


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A~ (r x n) for s = 1, or for every s if sigma is matched; B~ = 0.

    `weight` is m x n in float32, or E x m x n. `full_rank` is False for a weight of zeros, which gives A~ = 0: such an
    adapter never trains.
    """
    omega = for_each_expert(weight, seed, partial(_rows, rank, weight.shape[-2]))
    norm = weight.flatten(-2).norm(dim=-1)[..., None, None]
    size: Any = options.sigma
    if size == "matched":
        size = ROW / torch.where(norm > 0, norm, 1.0)
    return Factors(size * (omega.to(weight) @ weight), None, full_rank=bool((norm > 0).all()))


def _rows(rank: int, m: int, seed: int) -> Tensor:
    # Drawn row by row, so that a smaller rank has the first rows of a larger one.
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(m, generator=generator) for _ in range(rank)])


def _powers(options: Options) -> tuple[float, float]:
    if options.sigma == "matched":
        return 0.0, 0.0
    return 1.0, 0.0


METHOD = Method(
    name="nora",
    source="arXiv 2410.18965, formula of the authors' code",
    about="A0 = sigma / s Omega W with random Omega, B0 = 0: A0 lies in the row space of W, in the proportions of W.\n"
    "adapter.sigma: 0.02 is the authors' value for LLaMA; matched gives A0 the size of plain LoRA's, so that only its\n"
    "directions differ. With train.optimizer=preconditioned it is NoRA+.",
    factors=factors,
    cost=lambda m, n, rank: m * n * rank,
    has_b0=False,
    scale_powers=_powers,
)
