"""State of a run: all that resuming needs beside the tensors of adapter and optimizer."""

import math
from dataclasses import dataclass, field
from typing import Any

LARGEST_LOSS = 80.0
"""From which on a perplexity stays the same: the exponential would soon not be a number."""


@dataclass
class TrainState:
    """Where a run is.

    The data cursor is `step` alone: global step k reads sequences [k G, (k + 1) G) of the order. Random
    numbers (dropout) are seeded anew from (seed, step, micro-batch) for each micro-batch, so there is no
    generator state to keep.
    """

    step: int = 0
    """Optimizer steps done."""
    best_loss: float | None = None
    """Lowest held-out loss so far."""
    best_step: int | None = None
    """The step it was measured at."""
    stale: int = 0
    """Evaluations since then."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Every metric logged so far, one row per step, `step` among the columns."""
    kinds: list[dict[str, str]] = field(default_factory=list)
    """The kinds of the workers that have trained last (cluster/kind.py)."""
    precision: str | None = None
    """The base's, by torch's name: what `model.dtype: auto` meant where the run began."""
    self_test: dict[str, Any] | None = None
    """What the self-test of the model has found, and with what (cluster/self_tested.py)."""
    before: list[list[int]] | None = None
    """Answers to held-out prompts before training, as token ids; None until they were made."""

    def record(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Add a row to the history and return it."""
        row = {"step": float(step), **metrics}
        self.history.append(row)
        return row

    def note_evaluation(self, loss: float) -> bool:
        """Take in a held-out loss; True if it is the best so far. One that is not finite never is, nor stays it."""
        best = math.inf if self.best_loss is None or math.isnan(self.best_loss) else self.best_loss
        if loss < best:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            return True
        self.stale += 1
        return False


def perplexity(loss: float) -> float:
    """Of a mean loss per token."""
    return math.exp(min(loss, LARGEST_LOSS))
