"""A mixture of experts trains, is kept in a checkpoint and goes on like any other model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olora_ray.adapter.layer import AdaptedStack
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loader import StepLoader
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.optim import Schedule
from tests import tiny
from tests.crew import Crew
from tests.families import zoo
from tests.families.variants import ALL

STEPS = 4


def trainer(family: str = "qwen3_moe", dropout: float = 0.0) -> Trainer:
    settings = tiny.config(train__steps=STEPS, train__lr=2e-2, adapter__dropout=dropout)
    made = tiny.trainer(settings, model=zoo.make(ALL[family]))
    assert isinstance(made, Trainer)
    return made


def train(made: Trainer, start: int = 0, stop: int = STEPS) -> list[float]:
    store = tiny.store()
    loader = StepLoader(store, made.config.train, made.config.run.seed, "sdpa")
    steps = made.steps(loader, start, Schedule(made.config.train, store))
    return [result.loss for _, result in zip(range(start, stop), steps, strict=False)]


def test_the_experts_learn_what_the_linear_layers_do() -> None:
    made = trainer()
    before = evaluate(made, tiny.store(), "sdpa")
    train(made)
    assert evaluate(made, tiny.store(), "sdpa") < before
    for name, layer in made.adapted.items():
        assert layer.db.any(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_has_the_experts_and_training_goes_on_to_the_same_bits(tmp_path: Path, family: str) -> None:
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
            second.flat.vector, {f"{n}.{p}": getattr(w, p) for n, w in found.adapter.items() for p in ("da", "db")}
        )
    second.optimizer.load(found.optimizer, 2)
    train(second, start=2)
    assert torch.equal(second.flat.vector, whole.flat.vector)


def _step(strategy: str) -> tuple[float, Tensor]:
    """Loss and gradient of the first step of two workers."""
    settings = tiny.config(
        train__micro_batch=1, train__clip=None, cluster__workers=2, cluster__strategy=strategy, train__steps=1
    )
    made = tiny.trainer(settings, model=zoo.make(ALL["qwen3_moe"]), strategy=strategy)
    noise = torch.randn(made.flat.vector.shape, generator=torch.Generator().manual_seed(0))
    made.flat.vector.copy_(0.1 * noise)
    gradients: list[Tensor] = []
    made.optimizer.inner.register_step_pre_hook(lambda *_: gradients.append(made.flat.grad.clone()))
    store = tiny.store()
    loader = StepLoader(store, settings.train, settings.run.seed, "sdpa", dist.get_rank(), 2)
    result = next(made.steps(loader, 0, Schedule(settings.train, store)))
    return result.loss, gradients[0]


def test_a_sharded_mixture_trains_like_one_that_every_worker_holds(crew: Callable[[int], Crew]) -> None:
    (ddp, gradient), _ = crew(2).run(_step, "ddp")
    (fsdp, sharded), other = crew(2).run(_step, "fsdp")
    assert torch.equal(sharded, other[1])
    assert fsdp == pytest.approx(ddp, rel=1e-6)
    assert float((sharded - gradient).norm() / gradient.norm()) < 1e-5
