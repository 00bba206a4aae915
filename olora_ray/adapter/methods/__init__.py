"""The methods: one file per method, in the terms of method.py. Their index is config/tables.py."""

from functools import cache

from olora_ray.adapter.methods.method import Method
from olora_ray.config.tables import METHODS


@cache
def method_named(name: str) -> Method:
    return METHODS.load(name, Method)


def from_weights() -> list[str]:
    """Return this package's methods whose factors need the weight alone, and no data."""
    return [name for name in METHODS.own if method_named(name).needs == "weight"]
