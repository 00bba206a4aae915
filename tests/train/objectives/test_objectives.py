"""The objectives: tokens is what it was, and another one is a file of its own and nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_ray.config import tables
from olora_ray.tokens.collate import collate
from olora_ray.train.checkpoint import require_same
from olora_ray.train.held_out import evaluate, held_out
from olora_ray.train.objectives.objective import objective_named
from tests import example_objective, tiny
from tests.families import oracle
from tests.refused import refused


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with example_objective.installed(monkeypatch, tmp_path):
        yield


def identity(**changes: Any) -> dict[str, str]:
    found: dict[str, str] = tiny.spec(**changes).identity()
    return found


def test_each_member_has_its_name_in_the_index() -> None:
    assert [objective_named(name).name for name in tables.OBJECTIVES.own] == [
        *tables.OBJECTIVES.own
    ]


@pytest.mark.usefixtures("examples")
def test_the_identity_of_a_run_names_no_objective_but_others_than_tokens() -> None:
    assert "objective" not in identity()
    assert identity()["optimizer"] == "adamw"
    assert tiny.config().run.name == tiny.config(train__objective="tokens").run.name
    plugin = tables.OBJECTIVES.plugin("examples")
    own = identity(train__objective="examples")
    assert own == identity() | {"objective": f"examples of my-loss 1.0 {plugin.digest[:16]}"}


@pytest.mark.usefixtures("examples")
def test_a_run_is_not_resumed_with_another_objective() -> None:
    own = identity(train__objective="examples")
    require_same(identity(), identity(), "step-5")
    require_same(own, own, "step-5")
    for saved, wanted in ((identity(), own), (own, identity())):
        with refused("another objective"):
            require_same(saved, wanted, "step-5")


def test_the_losses_of_tokens_are_the_parts_of_their_sum_with_its_gradient() -> None:
    trainer = tiny.moved(tiny.trainer(tiny.config()))
    batch = collate([tiny.pack(9, 7, prompt=2), tiny.pack(12, prompt=3, seed=1)], "segments")
    gradients, sums = [], []
    for each in (False, True):
        trainer.flat.grad.zero_()
        found = trainer.loss(batch, each=each)
        found.sum().backward()
        gradients.append(trainer.flat.grad.clone())
        assert found.shape == (batch.labels.shape if each else ())
        sums.append(float(found.detach().sum()))
    assert torch.equal(*gradients)
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert torch.equal(trainer.loss(batch, each=True).detach(), trainer.loss.each(batch))
    assert sum(batch.examples) == len(batch.labels)


def means(trainer: Any, packs: Any) -> Tensor:
    """The mean loss of each example, from the logits of the model alone."""
    model = trainer.loss.model
    return torch.stack([oracle.losses(model, [each]).mean() for each in tiny.unpacked(packs)])


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_a_step_of_another_objective_is_its_mean_over_the_global_batch(micro: int) -> None:
    settings = tiny.config(
        train__objective="examples",
        train__global_batch=8,
        train__micro_batch=micro,
        train__clip=None,
    )
    trainer = tiny.moved(tiny.trainer(settings))
    store = tiny.store(8)
    expected = means(trainer, [store[number] for number in range(8)])
    expected.mean().backward()
    gradient = trainer.flat.grad.clone()
    seen = tiny.gradients(trainer)
    result = next(tiny.steps(trainer, store, count=4))
    assert result.loss == pytest.approx(float(expected.detach().mean()), rel=1e-5)
    assert result.more == {"hard": pytest.approx(float((expected > 3.0).float().mean()))}
    assert float((seen[0] - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("each", [False, True])
def test_a_held_out_loss_of_another_objective_is_its_mean(each: bool) -> None:
    trainer = tiny.moved(tiny.trainer(tiny.config(train__objective="examples")))
    store = tiny.store(3)
    expected = means(trainer, [store[number] for number in range(3)]).detach()
    found = evaluate(trainer, store, "segments", each=each)
    assert found.loss == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.whole == store.counts(range(3))
    if each:
        assert found.losses() == pytest.approx(expected.tolist(), rel=1e-5)


def test_losses_of_a_list_of_sequences_are_those_of_a_store() -> None:
    trainer, store = tiny.moved(tiny.trainer(tiny.config(train__micro_batch=2))), tiny.store(5)
    packs = [store[number] for number in range(5)]
    found = held_out(trainer.loss, packs, trainer.objective, "segments", width=2)
    assert len(found.losses()) == 3
    assert found.loss == evaluate(trainer, store, "segments").loss
