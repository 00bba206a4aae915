"""The optimizers: one file per optimizer, in the terms of optimizer.py. Their index is config/tables.py."""

from functools import cache

from olora_ray.config.tables import OPTIMIZERS
from olora_ray.train.optimizers.optimizer import FlatAdapters as FlatAdapters
from olora_ray.train.optimizers.optimizer import Optimizer as Optimizer
from olora_ray.train.optimizers.optimizer import Update as Update


@cache
def optimizer_named(name: str) -> Optimizer:
    return OPTIMIZERS.load(name, Optimizer)
