"""An objective: the loss that a training makes small, and all that other code may ask about it.

    mean loss = sum over the micro-batches of a global batch of `loss` / `weight` of the global batch

Loop, evaluation, gate and search use these functions alone, and never ask which objective it is. A loss is a function
of the losses of single tokens, which the model computes in one pass (`SupervisedLoss.forward` with `each`), or of
anything else that the model gives. `eval/loss` is the mean loss per token of the right answers of held-out rows, and
lower is better, whatever the objective is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import Tensor

from olora_ray.config.schema import Train
from olora_ray.config.tables import OBJECTIVES
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.plan import Counts
from olora_ray.train.loss import SupervisedLoss

HIGHEST = 80.0
"""A larger loss counts as this in a perplexity, because its exponential would soon overflow."""


class RowNumbers(NamedTuple):
    """The results of a model on one held-out row."""

    loss: float
    """Summed loss."""
    weight: int
    """The mean loss is the sum of the losses / the sum of the weights."""
    scores: dict[str, float]
    """Further results by name, each with weight 1."""


@dataclass(frozen=True)
class Objective:
    name: str
    """The value of `train.objective`."""
    loss: Callable[[SupervisedLoss, Batch, Counts], Tensor]
    """(model, micro-batch, size of the global batch) -> sums over the micro-batch, float32, (1 + more,).

    The first number is the loss to train on. The numbers of `more` follow, without gradient. The caller divides all of
    them by `weight` and hands them to `named`. Call the model itself (`model(batch)`), because a sharded base works
    only in that call.
    """
    each: Callable[[SupervisedLoss, Batch, Counts], Tensor]
    """(model, micro-batch, size of all) -> the same numbers for each example, float64, (examples, 1 + more), without
    gradient."""
    weight: Callable[[Counts], int]
    """Size of some examples -> the divisor of their summed loss; the weight of a sum is the sum of the weights."""
    unit: str
    """The unit that `weight` counts, for messages: the loss is a mean per this unit."""
    takes: frozenset[str]
    """The types of examples that it can learn from (`Format.makes`)."""
    more: tuple[str, ...] = ()
    """Names of further numbers: they become `train/NAME` of each step and `eval/NAME` of each evaluation."""
    means: Callable[[Sequence[float], Counts], dict[str, float]] | None = None
    """(numbers divided by `weight`, size of all examples) -> means by name, where these have other divisors.

    The first is what the training makes small; `loss` is among them."""
    row: Callable[[Sequence[float], Counts], RowNumbers] | None = None
    """(numbers of an example, its size) -> its results in an evaluation; None: the loss, and `weight`."""
    with_settings: Callable[[Train], "Objective"] | None = None
    """Return this objective with its own settings in `train`; None if it has none."""
    settings: str = ""
    """The own settings in words, for the identity of a run."""
    rate: float = 1.0
    """Multiple of the automatic learning rate, which is made for rows with answers."""
    fall: float | None = None
    """Fall of the mean loss of other rows in the first step that the automatic learning rate may make; None: any."""
    reference: bool = False
    """True if it needs the losses before the first step (`Pack.reference`)."""
    perplexity: bool = False
    """True if the exponential of the mean loss is a perplexity."""
    forwards: float = 1.0
    """Forward passes through the adapted layers in a step."""
    version: int = 1
    """Raise it when the same settings give other numbers; runs of another version are then other runs."""

    def identity(self) -> dict[str, str]:
        """Return what a run's identity has of it: nothing for `tokens`, which older runs do not name."""
        text = OBJECTIVES.identity(self.name)
        if self.version != 1:
            text = f"{text}, version {self.version}"
        if self.settings:
            text = f"{text}, {self.settings}"
        return {} if text == "tokens" else {"objective": text}

    @property
    def numbers(self) -> int:
        """The number of numbers that `loss` and `each` give."""
        return 1 + len(self.more)

    def named(self, numbers: Sequence[float], whole: Counts) -> dict[str, float]:
        """Return the means, what the training makes small first."""
        if self.means is not None:
            return self.means(numbers, whole)
        return dict(zip(("loss", *self.more), numbers, strict=True))

    def of_row(self, numbers: Sequence[float], size: Counts) -> RowNumbers:
        """Return the results of a held-out row from the numbers of `each`."""
        if self.row is not None:
            return self.row(numbers, size)
        return RowNumbers(numbers[0], self.weight(size), {})

    def measures(self) -> tuple[str, ...]:
        """Return the names of the metrics of an evaluation."""
        some = Counts(2, 2, 2, pairs=1, chosen=1, rejected=1)
        return tuple(self.evaluated(self.named([0.0] * self.numbers, some)))

    def evaluated(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of an evaluation from its means, as far as they are known."""
        metrics = {f"eval/{name}": value for name, value in means.items()}
        if self.perplexity:
            metrics["eval/perplexity"] = perplexity(means["loss"])
        return metrics


@cache
def objective_named(name: str) -> Objective:
    return OBJECTIVES.load(name, Objective)


def objective_of(train: Train) -> Objective:
    """Return the objective of a training, with its settings."""
    chosen = objective_named(train.objective)
    if chosen.with_settings is None:
        return chosen
    return chosen.with_settings(train)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, HIGHEST))
