"""PEFT in float32 is the oracle: same gradients, same first steps, for every method and with LoRA+."""

from typing import Any

import numpy as np
import peft
import pytest
import torch

from olora_ray.adapter.methods import from_weights
from olora_ray.tokens.collate import collate
from tests import tiny

RANK, ALPHA, RATE = 4, 8, 1e-3
BATCH = [tiny.pack(20, seed=1), tiny.pack(20, seed=2), tiny.pack(20, seed=3)]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, torch.optim.Optimizer]:
    """This project's trainer, PEFT's model, and PEFT's optimizer."""
    settings = tiny.decided(adapter__rank=RANK, adapter__alpha=ALPHA, train__clip=None)
    shape = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        init_lora_weights="olora",
        task_type="CAUSAL_LM",
    )
    oracle = peft.get_peft_model(tiny.llama(), shape)
    return (
        tiny.trainer(settings, "sdpa"),
        oracle,
        torch.optim.AdamW(trainable(oracle), lr=RATE, weight_decay=0.0),
    )


def oracle_loss(oracle: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.stack([pack.input_ids for pack in BATCH])).long()
    supervised = torch.from_numpy(np.stack([pack.supervised for pack in BATCH]))
    loss: torch.Tensor = oracle(
        input_ids=ids, labels=torch.where(supervised, ids, -100), use_cache=False
    ).loss
    return loss


def layer_of(oracle: Any, name: str) -> Any:
    return oracle.get_base_model().get_submodule(name)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.norm() if expected.any() else 1.0  # a gradient may be 0 exactly
    return float(((found - expected).norm() / size).detach())


def test_three_steps_equal_pefts(pair: tuple[Any, Any, torch.optim.Optimizer]) -> None:
    follow(*pair)


@pytest.mark.parametrize("method", from_weights())
def test_three_steps_equal_those_of_a_changed_base(method: str) -> None:
    """As in the papers: W - s B0 A0 in the base, and A and B trained from A0 and B0."""
    settings = tiny.decided(
        adapter__method=method, adapter__rank=RANK, adapter__alpha=ALPHA, train__clip=None
    )
    trainer = tiny.trainer(settings, "sdpa")
    oracle = peft_from(trainer)
    follow(trainer, oracle, torch.optim.AdamW(trainable(oracle), lr=RATE, weight_decay=0.0))


def test_five_steps_of_lora_plus_with_the_same_gradients_equal_pefts() -> None:
    from peft.optimizers import create_loraplus_optimizer

    settings = tiny.decided(
        adapter__method="lora",
        adapter__rank=RANK,
        adapter__alpha=ALPHA,
        train__clip=None,
        train__lr_ratio=16.0,
        train__weight_decay=0.0,
    )
    trainer = tiny.trainer(settings, "sdpa")
    oracle = peft_from(trainer)
    optimizer = create_loraplus_optimizer(
        oracle, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0
    )
    batch = collate(BATCH, "sdpa")
    for _ in range(5):
        trainer.flat.grad.zero_()
        (trainer.loss(batch) / len(batch.labels)).backward()
        for name, layer in trainer.adapted.items():
            layer_of(oracle, name).lora_A["default"].weight.grad = layer.da.grad.clone()
            layer_of(oracle, name).lora_B["default"].weight.grad = layer.db.grad.clone()
        trainer.optimizer.step(RATE)
        optimizer.step()
    for name, layer in trainer.adapted.items():
        theirs = layer_of(oracle, name)
        assert relative(layer.a0 + layer.da, theirs.lora_A["default"].weight) < 1e-6, name
        assert relative(layer.db, theirs.lora_B["default"].weight) < 1e-6, name
        assert float(layer.db.detach().abs().max()) > 10 * RATE, name


def peft_from(trainer: Any) -> Any:
    """Return PEFT's plain LoRA on the base, changed so that it starts where the trainer does."""
    shape = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    oracle = peft.get_peft_model(tiny.llama(), shape)
    for name, layer in trainer.adapted.items():
        theirs = layer_of(oracle, name)
        theirs.lora_A["default"].weight.data = layer.a0.clone()
        if layer.b0 is not None:
            theirs.lora_B["default"].weight.data = layer.b0.clone()
            theirs.base_layer.weight.data -= layer.scale * layer.b0 @ layer.a0
    return oracle


def trainable(oracle: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in oracle.parameters() if parameter.requires_grad]


def follow(trainer: Any, oracle: Any, optimizer: torch.optim.Optimizer) -> None:
    """Run three steps of both, and compare them at each step."""
    batch = collate(BATCH, "sdpa")
    starts = {name: layer.base.weight.clone() for name, layer in trainer.adapted.items()}
    losses = []
    for _ in range(3):
        trainer.flat.grad.zero_()
        loss = trainer.loss(batch) / len(batch.labels)
        loss.backward()
        expected = oracle_loss(oracle)
        optimizer.zero_grad()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        losses.append(loss.item())
        for name, layer in trainer.adapted.items():
            theirs = layer_of(oracle, name)
            assert relative(layer.da.grad, theirs.lora_A["default"].weight.grad) < 1e-4, name
            assert relative(layer.db.grad, theirs.lora_B["default"].weight.grad) < 1e-4, name
        trainer.optimizer.step(RATE)
        optimizer.step()
        for name, layer in trainer.adapted.items():
            theirs = layer_of(oracle, name)
            effective = theirs.base_layer.weight + theirs.get_delta_weight("default")
            ours = starts[name] + layer.weights().delta(layer.scale)
            assert relative(ours, effective) < 1e-5, name
            # And the change itself, which is far smaller than the weight.
            assert relative(ours - starts[name], effective - starts[name]) < 1e-2, name
    assert losses[2] < losses[0]
    assert all(
        torch.equal(layer.base.weight, starts[name]) for name, layer in trainer.adapted.items()
    )
