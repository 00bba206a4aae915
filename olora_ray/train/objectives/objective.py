"""An objective: the loss that a training makes small, and all that other code may ask about it.

    mean loss = sum over the micro-batches of a global batch of `loss` / `weight` of the global batch

Loop, evaluation, gate and search use these functions alone, and never ask which objective it is. A loss is a function
of the losses of single tokens, which the model computes in one pass (`SupervisedLoss.forward` with `each`), or of
anything else that the model gives. `eval/loss` is the mean on held-out rows, and lower is better, whatever the
objective is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from olora_ray.config.tables import OBJECTIVES
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.plan import Counts
from olora_ray.train.loss import SupervisedLoss

HIGHEST = 80.0
"""A larger loss counts as this in a perplexity, because its exponential would soon overflow."""


@dataclass(frozen=True)
class Objective:
    name: str
    """The value of `train.objective`."""
    loss: Callable[[SupervisedLoss, Batch, Counts], Tensor]
    """(model, micro-batch, size of the global batch) -> sums over the micro-batch, float32, (1 + more,).

    The first number is the loss to train on. The numbers of `more` follow, without gradient. The caller divides all of
    them by `weight`. Call the model itself (`model(batch)`), because a sharded base works only in that call.
    """
    each: Callable[[SupervisedLoss, Batch], Tensor]
    """(model, micro-batch) -> the same numbers for each example, float64, (examples, 1 + more), without gradient."""
    weight: Callable[[Counts], int]
    """Size of some examples -> the divisor of their summed loss; the weight of a sum is the sum of the weights."""
    unit: str
    """The unit that `weight` counts, for messages: the loss is a mean per this unit."""
    takes: frozenset[str]
    """The types of examples that it can learn from (`Format.makes`)."""
    more: tuple[str, ...] = ()
    """Names of further numbers: they become `train/NAME` of each step and `eval/NAME` of each evaluation."""
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
        return {} if text == "tokens" else {"objective": text}

    def measures(self) -> tuple[str, ...]:
        """Return the names of the metrics of an evaluation."""
        return tuple(self.evaluated([0.0] * (1 + len(self.more))))

    def evaluated(self, means: Sequence[float]) -> dict[str, float]:
        """Return the metrics of an evaluation from the mean loss and the means of `more`, as far as they are known."""
        loss, *others = means
        metrics = {"eval/loss": loss}
        if self.perplexity:
            metrics["eval/perplexity"] = perplexity(loss)
        for name, value in zip(self.more, others, strict=False):
            metrics[f"eval/{name}"] = value
        return metrics


@cache
def objective_named(name: str) -> Objective:
    return OBJECTIVES.load(name, Objective)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, HIGHEST))
