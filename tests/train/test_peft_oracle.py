"""PEFT's OLoRA in float32 is the oracle: same gradients, same first steps."""

from typing import Any

import numpy as np
import peft
import pytest
import torch

from olora_ray.tokens.collate import collate
from tests import tiny

RANK, ALPHA, RATE = 4, 8, 1e-3
BATCH = [tiny.pack(20, seed=1), tiny.pack(20, seed=2), tiny.pack(20, seed=3)]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, torch.optim.Optimizer]:
    """This project's trainer, PEFT's model, and PEFT's optimizer."""
    settings = tiny.config(adapter__rank=RANK, adapter__alpha=ALPHA, train__clip=None)
    shape = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights="olora", task_type="CAUSAL_LM"
    )
    oracle = peft.get_peft_model(tiny.llama(), shape)
    trainable = [parameter for parameter in oracle.parameters() if parameter.requires_grad]
    return tiny.trainer(settings, "sdpa"), oracle, torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)


def oracle_loss(oracle: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.stack([pack.input_ids for pack in BATCH])).long()
    supervised = torch.from_numpy(np.stack([pack.supervised for pack in BATCH]))
    loss: torch.Tensor = oracle(input_ids=ids, labels=torch.where(supervised, ids, -100), use_cache=False).loss
    return loss


def layer_of(oracle: Any, name: str) -> Any:
    return oracle.get_base_model().get_submodule(name)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def test_three_steps_equal_pefts(pair: tuple[Any, Any, torch.optim.Optimizer]) -> None:
    trainer, oracle, optimizer = pair
    batch = collate(BATCH, "sdpa")
    starts = {name: layer.base.weight.clone() for name, layer in trainer.adapted.items()}
    losses = []
    for _ in range(3):
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
    assert all(torch.equal(layer.base.weight, starts[name]) for name, layer in trainer.adapted.items())
