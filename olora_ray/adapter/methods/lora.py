"""Plain LoRA: random A, zero B (arXiv 2106.09685, section 4.1)."""

import math
from functools import partial

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options, for_each_expert


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A0 (r x n) as torch initialises a linear layer (Kaiming uniform, a = sqrt(5)); B0 = 0.

    `weight` is m x n, or E x m x n for a stack, whose expert number e gets the A0 of the seed `seed` + e. The same seed
    gives the same A0 on every device.
    """
    return Factors(for_each_expert(weight, seed, partial(_random, rank, weight.shape[-1])), None)


def _random(rank: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.kaiming_uniform_(torch.empty(rank, n), a=math.sqrt(5), generator=generator)


METHOD = Method(
    name="lora",
    source="arXiv 2106.09685, section 4.1",
    about="Plain LoRA: A0 as torch initialises a linear layer (Kaiming uniform), B0 = 0.\n"
    "Every other method is compared with it.",
    factors=factors,
    cost=lambda m, n, rank: m * rank**2 + m * n * rank,  # olora's: the true cost is close to zero
    has_b0=False,
)
