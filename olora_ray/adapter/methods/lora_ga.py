"""LoRA-GA: the adapter's first step goes in the direction of the weight's gradient (arXiv 2407.05000, section 3).

    G = U S V^T     A0 = g V[:r]  (r x n)     B0 = g U[:, r:2r]  (m x r)     g = m^(1/4) / sqrt(gamma)

G (m x n) is the mean gradient of the weight over some tokens of the training data. This is the paper's choice ("ArB2r"
and the stable scale of its code, which does not use s). PEFT's choice differs: its B0 has the size of the gradients.
"""

import torch
from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import singular
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options


def factors(gradient: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A0 and B0 for a gradient (m x n, float32) of any size, with 2r <= min(m, n); `seed` is not used.

    `full_rank` is False if the gradient has fewer than 2r directions; the missing directions are arbitrary.
    """
    vectors = singular.exact(gradient, 2 * rank)
    assert vectors.b0 is not None
    size = gradient.shape[-2] ** 0.25 / options.gamma**0.5
    a0 = torch.nn.functional.normalize(vectors.a0[..., :rank, :], dim=-1)
    b0 = torch.nn.functional.normalize(vectors.b0[..., rank:], dim=-2)
    return Factors((size * a0).contiguous(), (size * b0).contiguous(), vectors.full_rank)


METHOD = Method(
    name="lora_ga",
    source="arXiv 2407.05000, section 3",
    about="A0 and B0 are right and left singular vectors of the weight's gradient on tokens of the data, so that the\n"
    "first steps go where full fine-tuning would. The first output is the base's. The rank is at most min(m, n) / 2.",
    factors=factors,
    cost=lambda m, n, rank: singular.exact_cost(m, n, 2 * rank),
    needs="gradients",
    prefix=False,
    rank_limit=lambda m, n: min(m, n) // 2,
)
