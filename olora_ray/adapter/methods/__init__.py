"""The family: a method is one function from a weight ((E x) m x n, float32), a rank and a seed to Factors."""

from collections.abc import Callable

from torch import Tensor

from olora_ray.adapter.factors import Factors
from olora_ray.adapter.methods import lora, olora

METHODS: dict[str, Callable[[Tensor, int, int], Factors]] = {
    "olora": olora.factors,
    "lora": lora.factors,
}
