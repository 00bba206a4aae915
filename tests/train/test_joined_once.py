"""The factors of a layer are joined once per step for any micro-batches, and no bit depends on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.train.held_out import evaluate
from olora_ray.train.loop import Trainer
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

STEPS, MICRO_BATCHES = 3, 4


@dataclass(frozen=True)
class Case:
    model: Callable[[], Any]
    method: str = "olora"
    dropout: float = 0.0


CASES = {
    "fp32, dropout": Case(tiny.llama, dropout=0.2),
    "bf16, plain LoRA": Case(lambda: tiny.llama(dtype=torch.bfloat16), method="lora"),
    "experts one by one": Case(lambda: zoo.make(ALL["mixtral"], experts="eager"), dropout=0.2),
    "experts together": Case(
        lambda: zoo.make(ALL["mixtral"], torch.bfloat16, experts="grouped_mm")
    ),
}


def made(case: Case) -> Trainer:
    settings = tiny.decided(
        adapter__method=case.method,
        adapter__dropout=case.dropout,
        train__global_batch=MICRO_BATCHES,
        train__micro_batch=1,
        train__lr=0.01,
    )
    trainer: Trainer = tiny.trainer(settings, "sdpa", case.model())
    return trainer


def steps(trainer: Trainer, start: int = 0) -> Iterator[float]:
    return (
        result.loss for result in tiny.steps(trainer, count=STEPS, start=start, attention="sdpa")
    )


def trained(case: Case) -> tuple[list[float], Tensor]:
    """Return all numbers of a run that evaluates between its steps, and restores an earlier adapter."""
    trainer, held_out = made(case), tiny.store(2, seed=9)
    numbers, earlier = [], trainer.flat.vector.clone()
    for loss in steps(trainer):
        numbers += [loss, evaluate(trainer, held_out, "sdpa").loss]
        earlier, now = trainer.flat.vector.clone(), earlier
        trainer.flat.vector.copy_(now)
        numbers.append(evaluate(trainer, held_out, "sdpa").loss)
        trainer.flat.vector.copy_(earlier)
    trainer.optimizer.load(
        {name: torch.zeros_like(part) for name, part in trainer.optimizer.state().items()}, 1
    )
    numbers += list(islice(steps(trainer, 1), 1))
    return numbers, trainer.flat.vector


@pytest.mark.parametrize("name", CASES)
def test_no_bit_depends_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, vector = trained(CASES[name])
    monkeypatch.setattr(AdaptedWeight, "joined", AdaptedWeight._join)
    expected, wanted = trained(CASES[name])
    assert losses == expected
    assert torch.equal(vector, wanted)
    assert [losses[5], losses[8]] == [losses[1], losses[4]], "an earlier adapter measures as it did"
    assert len(set(losses)) == len(losses) - 2
