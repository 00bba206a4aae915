"""What draws the values of a trial: numbers that follow from a seed, or an Optuna trial."""

import math
from collections.abc import Container
from typing import Any

import numpy as np

from olora_ray.sweep.domain import TIMES, Domain, rounded


class Seeded:
    """Draws that follow from a seed alone; what is listed `in_turn` is taken one by one, not by chance."""

    def __init__(self, seed: tuple[int, ...], turn: int = 0, in_turn: Container[str] = ()) -> None:
        """`turn` counts the combinations of the fields `in_turn`, from 0."""
        self.random, self.rest, self.in_turn = np.random.default_rng(seed), turn, in_turn

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`; of a grid the one whose turn it is."""
        if name.removesuffix(TIMES) in self.in_turn:
            self.rest, place = divmod(self.rest, len(options))
            return options[place]
        return options[int(self.random.integers(len(options)))]

    def number(self, name: str, domain: Domain) -> Any:
        """A number of the domain's range."""
        if domain.quniform:
            return domain.at(int(self.random.integers(domain.steps())))
        low, high = domain.extremes()
        if domain.loguniform:
            return rounded(math.exp(self.random.uniform(math.log(low), math.log(high))), low, high)
        return rounded(float(self.random.uniform(low, high)), low, high)


class Suggested:
    """Draws made by an Optuna trial."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`."""
        return self.trial.suggest_categorical(name, list(options))

    def number(self, name: str, domain: Domain) -> Any:
        """A number of the domain's range."""
        low, high = domain.extremes()
        if domain.quniform is None:
            return self.trial.suggest_float(name, low, high, log=domain.loguniform is not None)
        step = domain.quniform[2]
        if isinstance(low, int):
            return self.trial.suggest_int(name, low, high, step=int(step))
        return self.trial.suggest_float(name, low, high, step=step)
