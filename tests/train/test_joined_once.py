"""The factors of a layer are joined once a step, whatever the micro-batches, and not one bit depends on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from olora_ray.adapter import layer as layer_module
from olora_ray.adapter.layer import AdaptedStack, AdaptedWeight
from olora_ray.train.base_files import decoder_layers
from olora_ray.train.loader import StepLoader
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.optim import Schedule
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

STEPS, MICRO_BATCHES = 3, 4


@dataclass(frozen=True)
class Case:
    model: Callable[[], Any]
    method: str = "olora"
    dropout: float = 0.0
    recomputed: bool = False


CASES = {
    "fp32, dropout": Case(tiny.llama, dropout=0.2),
    "bf16, plain LoRA": Case(lambda: tiny.llama(dtype=torch.bfloat16), method="lora"),
    "bf16, recomputed": Case(lambda: tiny.llama(dtype=torch.bfloat16), recomputed=True),
    "experts one by one": Case(lambda: zoo.make(ALL["mixtral"], experts="eager"), dropout=0.2),
    "experts together": Case(lambda: zoo.make(ALL["mixtral"], torch.bfloat16, experts="grouped_mm")),
}
OF_LAYERS = ["fp32, dropout", "bf16, plain LoRA", "bf16, recomputed"]


def made(case: Case) -> Trainer:
    model = case.model()
    if case.recomputed:
        for block in decoder_layers(model):
            block.forward = lambda *args, run=block.forward, **named: checkpoint(
                run, *args, use_reentrant=False, **named
            )
    settings = tiny.config(
        adapter__method=case.method,
        adapter__dropout=case.dropout,
        train__global_batch=MICRO_BATCHES,
        train__micro_batch=1,
        train__lr=0.01,
    )
    trainer: Trainer = tiny.trainer(settings, "sdpa", model)
    return trainer


def steps(trainer: Trainer, start: int = 0) -> Iterator[float]:
    store, settings = tiny.store(), trainer.config
    schedule = Schedule(settings.train.model_copy(update={"steps": STEPS}), store)
    loader = StepLoader(store, settings.train, settings.run.seed, "sdpa")
    return (result.loss for result in trainer.steps(loader, start, schedule))


def trained(case: Case) -> tuple[list[float], Tensor]:
    """All the numbers of a run that measures between its steps, and takes an earlier adapter up again."""
    trainer, held_out = made(case), tiny.store(2, seed=9)
    numbers, earlier = [], trainer.flat.vector.clone()
    for loss in steps(trainer):
        numbers += [loss, evaluate(trainer, held_out, "sdpa")]
        earlier, now = trainer.flat.vector.clone(), earlier
        trainer.flat.vector.copy_(now)
        numbers.append(evaluate(trainer, held_out, "sdpa"))
        trainer.flat.vector.copy_(earlier)
    trainer.optimizer.load({name: torch.zeros_like(part) for name, part in trainer.optimizer.state().items()}, 1)
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


@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_layer_is_joined_once_a_step(name: str, joins: list[int]) -> None:
    trainer = made(CASES[name])
    run = steps(trainer)
    for done in range(1, STEPS + 1):
        next(run)
        assert len(joins) == done * len(trainer.adapted)
        assert not any(layer._made for layer in trainer.adapted.values()), "nothing is kept from step to step"


@pytest.mark.parametrize("name", ["experts one by one", "experts together"])
def test_an_expert_is_joined_once_a_step_at_most(name: str, joins: list[int]) -> None:
    trainer = made(CASES[name])
    next(steps(trainer))
    layers = trainer.adapted.values()
    assert 0 < len(joins) <= sum(len(layer.da) if isinstance(layer, AdaptedStack) else 1 for layer in layers)


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every join."""
    seen, old = [], layer_module.joined

    def joined(*args: Any) -> tuple[Tensor, Tensor]:
        seen.append(1)
        return old(*args)

    monkeypatch.setattr(layer_module, "joined", joined)
    return seen
