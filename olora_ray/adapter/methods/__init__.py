"""The family: one file per method, in the terms of method.py."""

from olora_ray.adapter.methods import eva, lora, lora_ga, milora, nora, olora, orthogonal, pissa, pissa_fast
from olora_ray.adapter.methods.method import Method as Method
from olora_ray.adapter.methods.method import Options as Options

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (olora, lora, pissa, pissa_fast, milora, orthogonal, nora, eva, lora_ga)
}

FROM_WEIGHTS = tuple(name for name, method in METHODS.items() if method.needs == "weight")
"""Those whose factors follow from the weight alone."""
