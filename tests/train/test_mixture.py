"""A mixture of experts trains, is checkpointed and resumes like any other model."""

from pathlib import Path

import pytest
import torch

from olora_ray.adapter.layer import AdaptedStack
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loop import Trainer
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

STEPS = 4


def trainer(family: str = "qwen3_moe", dropout: float = 0.0) -> Trainer:
    settings = tiny.decided(train__steps=STEPS, train__lr=2e-2, adapter__dropout=dropout)
    made = tiny.trainer(settings, model=zoo.make(ALL[family]))
    assert isinstance(made, Trainer)
    return made


def train(made: Trainer, start: int = 0, stop: int = STEPS) -> list[float]:
    steps = tiny.steps(made, start=start, attention="sdpa")
    return [result.loss for _, result in zip(range(start, stop), steps, strict=False)]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_has_the_experts_and_training_goes_on_to_the_same_bits(
    tmp_path: Path, family: str
) -> None:
    whole = trainer(family, dropout=0.1)
    train(whole)

    first = trainer(family, dropout=0.1)
    train(first, stop=2)
    adapter = {name: layer.weights() for name, layer in first.adapted.items()}
    assert any(isinstance(layer, AdaptedStack) for layer in first.adapted.values())
    state = TrainState(step=2)
    checkpoint.save(tmp_path / "kept", adapter, None, first.optimizer.state(), state, {}, "")
    found = checkpoint.load(tmp_path / "kept")
    second = trainer(family, dropout=0.1)
    for name, weights in found.adapter.items():
        assert torch.equal(weights.factors.a0, second.adapted[name].a0)
        second.flat.load(
            second.flat.vector,
            {f"{n}.{p}": getattr(w, p) for n, w in found.adapter.items() for p in ("da", "db")},
        )
    second.optimizer.load(found.optimizer, 2)
    train(second, start=2)
    assert torch.equal(second.flat.vector, whole.flat.vector)
