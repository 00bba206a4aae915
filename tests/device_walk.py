"""A walk of a small training over a device: initialisation, evaluation, steps, checkpoint, resumption, answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olora_ray.cluster.start import resume
from olora_ray.tokens.collate import collate
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import Checkpoint, TrainState
from olora_ray.train.generate import Question, answer
from olora_ray.train.held_out import evaluate
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from tests import tiny

Keep = Callable[[Callable[[Path], None]], Checkpoint]
"""Has a checkpoint written by the function that it gets, and reads it back."""
QUESTIONS = [Question(tuple(range(5, 5 + length)), ()) for length in (4, 9, 2)]
STEPS = 2
LIMIT = 4
"""Tokens of an answer."""


@dataclass(frozen=True)
class Seen:
    """What was measured on the way."""

    before: float
    """Held-out loss at the start."""
    losses: list[float]
    """Of the steps, and of the last one again from the checkpoint."""
    after: float
    """Held-out loss of the adapter that counts as the best: the one in the checkpoint."""
    answers: list[list[int]]


def start(
    model: Any,
    device: torch.device,
    method: str = "olora",
    dropout: float = 0.0,
    on_device: bool = False,
    changes: Mapping[str, Any] = {},
) -> Trainer:
    """A trainer as a worker makes it; `on_device`: the base lies there already, as one that adapters share."""
    own = {
        f"train__{name}": value
        for name, value in {"steps": STEPS, "global_batch": 2, **changes}.items()
    }
    if on_device:
        model.to(device)
    config = tiny.config(adapter__method=method, adapter__dropout=dropout, **own)
    trainer: Trainer = tiny.trainer(config, model=model, device=device)
    return trainer


def walk(trainer: Trainer, keep: Keep) -> Seen:
    """All that a worker does with a trainer."""
    attention, held_out = trainer.loss.model.config._attn_implementation, tiny.store(2, seed=9)
    before = evaluate(trainer, held_out, attention).loss
    losses = steps(trainer, 0)
    state = TrainState(step=STEPS, best_step=STEPS - 1)
    best = resume(trainer, keep(trainer.snapshot(state, trainer.flat.vector.clone(), {}, "")))
    losses += steps(trainer, STEPS - 1)
    assert best is not None
    trainer.flat.vector.copy_(best)
    batch = collate([held_out[0]], attention)
    assert (
        trainer.loss.each(batch.to(trainer.device)).shape == batch.labels.shape
    )  # as an evaluation measures rows
    return Seen(before, losses, evaluate(trainer, held_out, attention).loss, answers(trainer))


def kept_in(folder: Path) -> Keep:
    """Checkpoints as they are: in a folder."""

    def keep(write: Callable[[Path], None]) -> Checkpoint:
        write(folder)
        return checkpoint.load(folder)

    return keep


def steps(trainer: Trainer, first: int) -> list[float]:
    """The losses of the steps from number `first` on."""
    settings, store = trainer.config, tiny.store()
    loader = StepLoader(
        store, settings.train, settings.run.seed, trainer.loss.model.config._attn_implementation
    )
    return [result.loss for result in trainer.steps(loader, first, Schedule(settings.train, store))]


def answers(trainer: Trainer) -> list[list[int]]:
    """Answers to a few questions; no token ends them."""
    return answer(trainer, QUESTIONS, LIMIT, [tiny.VOCABULARY - 1], batch=2)
