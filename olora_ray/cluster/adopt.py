"""The state of a training goes from the worker that is furthest to all others of a new group.

When a group breaks, some of its members may have done a step, or an evaluation, that others have not; a newcomer comes
from a checkpoint. Since all compute the same, workers that are equally far have the same state.
"""

from dataclasses import dataclass
from typing import Any

import torch

from olora_ray.cluster.evaluator import Evaluator
from olora_ray.common import collectives
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loop import StepResult, Trainer


@dataclass
class Progress:
    """Where a worker is between two steps, beside its tensors."""

    state: TrainState
    pending: StepResult | None = None
    """The step that is done, and neither evaluated nor told."""
    torn: bool = False
    """Whether the tensors are a mixture, since another's did not arrive as a whole."""

    def mark(self) -> tuple[int, int]:
        """Grows with everything that is done: steps, and rows that are told."""
        return TORN if self.torn else (self.state.step, len(self.state.history))


TORN = (-1, 0)
"""The mark of a state that nobody may go on with."""


def adopt(here: Progress, trainer: Trainer, evaluator: Evaluator) -> Progress:
    """What all of a group go on with, their adapters and optimizers included; all of them must call it together.

    Raises PeerLost, after which it is to be called again in the next group, and RuntimeError if nobody has a whole
    state: the only one that had was lost while it was giving it.
    """
    marks = collectives.gather(here.mark())
    furthest = max(marks)
    if furthest == TORN:
        raise RuntimeError("no worker is left that has the state of the training")
    if min(marks) == furthest:
        return here
    source = marks.index(furthest)
    own = collectives.rank() == source
    found: Any = collectives.from_one((here, evaluator.best is not None) if own else None, source)
    progress, has_best = found
    here.torn = not own  # until all of it is here
    flat = trainer.flat
    if not has_best:
        evaluator.best = None
    elif not own:
        # A new one: a checkpoint that is being written may still have that of before.
        evaluator.best = torch.empty_like(flat.vector)
    best = [] if evaluator.best is None else [evaluator.best]
    for tensor in [flat.vector, *trainer.optimizer.moments.values(), *best]:
        collectives.broadcast_in_place(tensor, source)
    trainer.optimizer.at(progress.state.step)
    return here if own else progress
