"""Recomputation of blocks in the backward pass changes no bit of a training."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olora_ray.adapter.layer import AdaptedLinear
from olora_ray.config.decided import Recompute
from olora_ray.tokens.collate import Batch, collate
from olora_ray.train.generate import Question, answer
from olora_ray.train.held_out import evaluate
from olora_ray.train.loop import Trainer, train_mode
from olora_ray.train.parallel import place_model
from olora_ray.train.self_test import check_adapters
from olora_ray.train.sharded_reader import decoder_layers
from tests import tiny
from tests.crew import Crews
from tests.families import zoo
from tests.families.variants import ALL
from tests.refused import refused

FAMILIES = ["llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss", "mamba2", "deepseek_v3", "lfm2"]
CPU = torch.device("cpu")


def trainer(model: Any, on: Recompute, **changes: Any) -> Trainer:
    """Return a trainer whose blocks are recomputed if `on`."""
    made = tiny.trainer(tiny.decided(**changes), model=model)
    made.loss.recompute = on
    place_model(made.loss, "ddp", CPU)
    tiny.moved(made)
    return made


def gradient(made: Trainer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, all gradients, and the next random number."""
    train_mode(made.adapted, True)
    torch.manual_seed(1)
    total = made.loss(batch)
    total.backward()
    train_mode(made.adapted, False)
    found = made.flat.grad.clone()
    made.flat.grad.zero_()
    assert found.any()
    return total.detach(), found, torch.rand(3)


def runs(model: Any) -> list[int]:
    """Return a list with a number for each run of the first adapted layer of the last block."""
    count: list[int] = []
    part = next(
        part for part in decoder_layers(model)[-1].modules() if isinstance(part, AdaptedLinear)
    )
    part.register_forward_hook(lambda *_: count.append(1))
    return count


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
def test_packed_sequences_have_the_same_bits(
    attention: str, dtype: torch.dtype, dropout: float
) -> None:
    batch = collate([tiny.pack(9, 7, 4), tiny.pack(12)], attention)
    models = [tiny.llama(attention=attention, dtype=dtype) for _ in range(3)]
    assert_same_bits(models, batch, dropout)


def assert_same_bits(models: list[Any], batch: Batch, dropout: float) -> None:
    found = []
    for model, on in zip(models, (False, "swiglu", True), strict=True):
        made = trainer(model, on, adapter__dropout=dropout)
        count = runs(made.loss.model)
        found.append(gradient(made, batch))
        assert len(count) == (2 if on is True else 1)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_block_has_the_same_bits(family: str) -> None:
    batch = collate([tiny.pack(9), tiny.pack(12, seed=1)], "sdpa")
    assert_same_bits([zoo.make(ALL[family]) for _ in range(3)], batch, dropout=0.1)


def _steps(
    strategy: str, on: bool
) -> tuple[list[float], Tensor, float, list[list[int]], list[int]]:
    settings = tiny.decided(
        cluster__workers=2,
        cluster__strategy=strategy,
        train__micro_batch=1,
        train__global_batch=3,
        adapter__dropout=0.2,
    )
    made = tiny.trainer(settings, model=tiny.llama(attention="segments"))
    made.loss.recompute = on
    place_model(made.loss, strategy, CPU)
    count = runs(made.loss.model)
    losses = [result.loss for result in tiny.steps(made, count=3)]
    runs_of_steps = len(count)
    return losses, *measured(made), [runs_of_steps, len(count)]


def measured(made: Trainer) -> tuple[Tensor, float, list[list[int]]]:
    """Return the adapter, its held-out loss and its answers."""
    held_out = evaluate(made, tiny.store(3, seed=9), "segments").loss
    questions = [Question((5, 6, 7), ()), Question((8, 9), ())]
    answers = answer(made, questions, 4, [1], dist.get_rank(), 2, batch=2)
    return made.flat.vector.clone(), held_out, answers


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_train_to_the_same_bits(crew: Crews, strategy: str) -> None:
    without, with_it = (crew(2).run(_steps, strategy, on) for on in (False, True))
    for one, other in zip(without, with_it, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert one[2:4] == other[2:4]
        assert other[4][0] == 2 * one[4][0]
        # Evaluation and answers run each block once.
        assert other[4][1] - other[4][0] == one[4][1] - one[4][0]


def test_a_block_that_does_something_twice_is_refused_before_the_first_step() -> None:
    made = trainer(tiny.llama(attention="segments"), on=True)
    made.flat.vector.zero_()
    packs = [tiny.pack(9, 7), tiny.pack(12)]
    check_adapters(made.loss, made.adapted, packs, "segments", CPU, new=True)
    block = decoder_layers(made.loss.model)[0]
    inner, seen = block.mlp.forward, []

    def counting(x: Tensor) -> Tensor:
        seen.append(1)
        result: Tensor = inner(x) * (1.0 + 0.001 * len(seen) * torch.is_grad_enabled())
        return result

    block.mlp.forward = counting
    with refused("train.activation_checkpointing: "):
        check_adapters(made.loss, made.adapted, packs, "segments", CPU, new=False)
