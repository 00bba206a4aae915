"""The objectives: one file per objective, in the terms of objective.py. Their index is config/tables.py."""

from functools import cache

from olora_ray.config.tables import OBJECTIVES
from olora_ray.train.objectives.objective import Objective as Objective


def identity(name: str) -> dict[str, str]:
    """Return what a run's identity has of its objective: nothing for `tokens`, which older runs do not name."""
    version = objective_named(name).version
    text = OBJECTIVES.identity(name)
    if version != 1:
        text = f"{text}, version {version}"
    return {} if text == "tokens" else {"objective": text}


@cache
def objective_named(name: str) -> Objective:
    return OBJECTIVES.load(name, Objective)
