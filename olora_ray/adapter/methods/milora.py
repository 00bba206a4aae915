"""MiLoRA: minor singular values and vectors of the weight (arXiv 2406.09044)."""

from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import singular
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options
from olora_ray.adapter.methods.pissa import root_of_scale


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """A~ = sqrt(S) V^T (r x n) and B~ = U sqrt(S) (m x r) of the r smallest singular values, the smallest first.

    `weight` is m x n in float32 with r <= min(m, n), or E x m x n; `seed` is not used. `full_rank` is False where a
    value is so small that its vectors are noise; a value of 0 gives a direction that never trains.
    """
    return singular.exact(weight, rank, smallest=True)


METHOD = Method(
    name="milora",
    source="arXiv 2406.09044",
    about="As pissa, of the r smallest singular values: what the model uses most is left alone at the start.\n"
    "In weights that were quantised once these directions are rounding noise.",
    factors=factors,
    cost=singular.exact_cost,
    scale_powers=root_of_scale,
)
