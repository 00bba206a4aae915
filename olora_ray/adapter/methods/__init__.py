"""The methods: one file per method, in the terms of method.py."""

from olora_ray.adapter.methods import eva, lora, milora, nora, olora, orthogonal, pissa
from olora_ray.adapter.methods.eva import Components as Components
from olora_ray.adapter.methods.eva import principal as principal
from olora_ray.adapter.methods.method import Method as Method
from olora_ray.adapter.methods.method import Options as Options

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        olora.METHOD,
        lora.METHOD,
        pissa.METHOD,
        milora.METHOD,
        orthogonal.METHOD,
        nora.METHOD,
        eva.METHOD,
    )
}

FROM_WEIGHTS = tuple(name for name, method in METHODS.items() if method.needs == "weight")
"""Methods whose factors need the weight alone, and no data."""
