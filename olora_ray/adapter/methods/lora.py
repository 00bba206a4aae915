"""Plain LoRA: random A, zero B (arXiv 2106.09685, section 4.1)."""

import math

import torch
from torch import Tensor

from olora_ray.adapter.factors import Factors


def factors(weight: Tensor, rank: int, seed: int) -> Factors:
    """A0 (r x n) as torch initialises a linear layer (Kaiming uniform, a = sqrt(5)); B0 = 0.

    `weight` is m x n; the same `seed` gives the same A0 on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    a0 = torch.empty(rank, weight.shape[1])
    torch.nn.init.kaiming_uniform_(a0, a=math.sqrt(5), generator=generator)
    return Factors(a0.to(weight.device), None)
