"""Even OLoRA: OLoRA's subspaces, with factors of a size at which one learning rate suits all layers.

OLoRA's A0 = B0^T W carries all of W's size, and B0 has columns of length 1. So the first steps of Adam move a layer's
output 5 to 70 times as far as plain LoRA's do (train/first_step.py), and one rate cannot suit all layers. Two numbers
per layer take the size out and leave the subspaces and the exact start as they are:

    A0 = a Q^T W     B0 = b Q     a = sqrt(r / 3) / |Q^T W|_F     b = 0.72 sqrt(r m) / n

Rows of A0 are then as long as plain LoRA's, and dA moves the output as far as dB does, for inputs without a direction
of their own. The first batch of a training then corrects a and b (`first_step.even`): both moves become 1 / sqrt(2) of
plain LoRA's. Layers of stacked experts keep the a and b above.
"""

import math

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import olora
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A0 (r x n) and B0 (m x r) from the weight (m x n, or E x m x n) alone; `seed` is not used."""
    start = olora.factors(weight, rank, seed, options)
    assert start.b0 is not None
    m, n = weight.shape[-2:]
    size = start.a0.flatten(-2).norm(dim=-1)[..., None, None]
    a = math.sqrt(rank / 3) / torch.where(size > 0, size, 1.0)
    return Factors(a * start.a0, 0.72 * math.sqrt(rank * m) / n * start.b0, start.full_rank)


METHOD = Method(
    name="olora_even",
    source="this project; the subspaces are those of arXiv 2406.01775",
    about="olora with A0 and B0 rescaled per layer, so that the first step moves each layer as far as plain LoRA's.\n"
    "The size comes from the weight, then from the first batch.",
    factors=factors,
    cost=olora.METHOD.cost,
    prefix=False,
    even=True,
)
