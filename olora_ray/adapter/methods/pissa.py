"""PiSSA: principal singular values and vectors of the weight (arXiv 2404.02948), exactly."""

from torch import Tensor

from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import singular
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options


def factors(weight: Tensor, rank: int, seed: int, options: Options = DEFAULTS) -> Factors:
    """Return A~ = sqrt(S_r) V_r^T (r x n) and B~ = U_r sqrt(S_r) (m x r), the largest singular value first.

    `weight` is m x n in float32 with r <= min(m, n), or E x m x n; `seed` is not used.
    """
    return singular.exact(weight, rank)


def root_of_scale(options: Options) -> tuple[float, float]:
    """Return the powers of s for A0 = A~ / sqrt(s), B0 = B~ / sqrt(s): then s B0 A0 does not depend on s."""
    return 0.5, 0.5


METHOD = Method(
    name="pissa",
    source="arXiv 2404.02948",
    about="s B0 A0 is the best approximation of W of rank r: its r largest singular values, shared by B0 and A0.\n"
    "Exact, from eigenvectors of the smaller Gram matrix in float64: minutes on CPUs for a layer whose shorter side\n"
    "is above about 4,096.",
    factors=factors,
    cost=singular.exact_cost,
    scale_powers=root_of_scale,
)
