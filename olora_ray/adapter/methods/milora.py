"""MiLoRA: minor singular values and vectors of the weight (arXiv 2406.09044)."""

from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import singular
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options
from olora_ray.adapter.methods.pissa import root_of_scale


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A~ = sqrt(S) V^T (r x n) and B~ = U sqrt(S) (m x r) of the r smallest singular values, smallest first.

    `weight` is m x n in float32 with r <= min(m, n), or E x m x n; `seed` is not used. `full_rank` is False if a value
    is so small that its vectors are noise; a value of 0 gives a direction that never trains.
    """
    return singular.exact(weight, rank, smallest=True)


METHOD = Method(
    name="milora",
    source="arXiv 2406.09044",
    about="Like pissa, with the r smallest singular values: the directions that the model uses most stay out of it.\n"
    "In weights that have been quantised before, these directions are rounding noise.",
    factors=factors,
    cost=singular.exact_cost,
    scale_powers=root_of_scale,
)
