"""The loop gives the same numbers for any split, interruption or repetition of the work."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.held_out import evaluate
from olora_ray.train.loader import StepLoader, total_steps
from olora_ray.train.loop import Trainer
from tests import tiny
from tests.crew import Crews
from tests.families import oracle
from tests.refused import refused

STEPS = 5


def first_gradient(
    settings: Config, store: Any, attention: str = "segments"
) -> tuple[float, Tensor]:
    """Return the loss of the first step and its gradient."""
    trainer = tiny.moved(tiny.trainer(settings, attention))
    seen = tiny.gradients(trainer)
    result = next(tiny.steps(trainer, store, attention=attention))
    return result.loss, seen[0]


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 2e-6


def settings_for(micro: int, workers: int = 1, batch: int = 8) -> Config:
    return tiny.decided(
        train__global_batch=batch,
        train__micro_batch=micro,
        train__clip=None,
        cluster__workers=workers,
    )


@pytest.fixture(scope="module")
def whole() -> tuple[float, Tensor]:
    """Return the loss and gradient of one step over all 8 packs at once."""
    return first_gradient(settings_for(micro=8), tiny.store(8))


def test_the_loss_is_the_mean_over_supervised_tokens_of_the_global_batch(
    whole: tuple[float, Tensor],
) -> None:
    store = tiny.store(8)
    trainer = tiny.moved(tiny.trainer(settings_for(8), "sdpa"))
    expected = oracle.losses(trainer.loss.model, [store[i] for i in range(8)]).mean()
    assert whole[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batch_and_accumulation_do_not_matter(
    whole: tuple[float, Tensor], micro: int, attention: str
) -> None:
    settings = settings_for(micro)
    assert settings.accumulation() == 8 // micro
    assert_same(first_gradient(settings, tiny.store(8), attention), whole)


@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
def test_packing_does_not_matter(whole: tuple[float, Tensor], attention: str) -> None:
    packs = tiny.store(8)
    singles = tiny.ListStore(tiny.unpacked([packs[i] for i in range(8)]))
    settings = settings_for(micro=8, batch=len(singles))
    assert_same(first_gradient(settings, singles, attention), whole)


def test_a_signal_of_one_worker_reaches_all_and_changes_nothing(
    crew: Crews,
) -> None:
    plain = crew(2).run(_signals, {})
    assert {tuple(signals) for signals, _ in plain} == {(False,) * STEPS}
    signalled = crew(2).run(_signals, {1: 1, 3: 0})
    assert {tuple(signals) for signals, _ in signalled} == {(False, True, False, True, False)}
    assert [adapter for _, adapter in signalled] == [adapter for _, adapter in plain]


def _signals(by_step: dict[int, int]) -> tuple[list[bool], bytes]:
    """Return the signals and the adapter, if a worker signals at some steps."""
    rank = torch.distributed.get_rank()
    settings, store, signals = settings_for(1, workers=2), tiny.store(8), list[bool]()
    trainer = tiny.trainer(settings)
    trainer.signal = lambda: by_step.get(len(signals)) == rank
    steps = tiny.steps(trainer, store, STEPS)
    for _ in range(STEPS):
        signals.append(next(steps).signal)
    return signals, trainer.flat.vector.numpy().tobytes()


def poisoned(settings: Config, store: Any) -> tuple[Trainer, int]:
    """Return a trainer for which one pack gives NaN, and the index of that pack, which the second step reads first."""
    trainer = tiny.trainer(settings)
    loader = StepLoader(store, settings.train, settings.run.seed, "segments")
    index = loader.read(1).sequences[0][0]
    store[index].input_ids[0] = 1  # a token that is nowhere else
    with torch.no_grad():
        trainer.loss.model.get_input_embeddings().weight[1] = torch.nan
    return trainer, index


def test_a_nan_loss_stops_with_the_step_and_the_rows() -> None:
    settings, store = tiny.decided(train__micro_batch=1), tiny.store()
    trainer, index = poisoned(settings, store)
    steps = tiny.steps(trainer, store, STEPS)
    assert next(steps).step == 1
    before = trainer.flat.vector.clone()
    with refused("step 2") as caught:
        next(steps)
    assert all(origin in str(caught.value) for origin in store.origins(index))
    others = {origin for i in range(len(store)) if i != index for origin in store.origins(i)}
    assert not any(f"{origin}," in str(caught.value) for origin in others)
    assert torch.equal(trainer.flat.vector, before)  # nothing was learned from it


def test_a_nan_loss_of_one_worker_stops_all_with_the_same_error(
    crew: Crews,
) -> None:
    one, two = crew(2).run(_poisoned_worker)
    assert isinstance(one, UserError)
    assert isinstance(two, UserError)
    assert str(one) == str(two)
    assert "rows.jsonl:" in str(one)


def _poisoned_worker() -> None:
    settings, store = tiny.decided(train__micro_batch=1, cluster__workers=2), tiny.store()
    trainer, _ = poisoned(settings, store)
    list(tiny.steps(trainer, store, STEPS))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("step", [0, 7])
def test_a_held_out_loss_that_is_not_finite_names_the_step_and_the_rows(
    step: int, each: bool
) -> None:
    settings, store = tiny.decided(train__micro_batch=2), tiny.store(7)
    trainer, index = poisoned(settings, store)
    with refused(f"step {step}: the held-out loss is not finite; it comes from") as caught:
        evaluate(trainer, store, "segments", step, each)
    first = index - index % 2
    bad = store.origins(index)[:1] if each else store.origins(index)
    assert all(origin in str(caught.value) for origin in bad)
    others = {
        origin
        for i in range(len(store))
        if i not in (first, first + 1)
        for origin in store.origins(i)
    }
    assert not any(f"{origin}," in str(caught.value) for origin in others)
    assert ("train.lr" in str(caught.value)) == (step > 0)


def test_a_loss_that_is_not_finite_is_no_best_one() -> None:
    state = TrainState()
    assert not state.note_evaluation(math.nan)
    assert not state.note_evaluation(math.inf)
    assert (state.best_loss, state.best_step, state.stale) == (None, None, 2)
    state.best_loss, state.best_step = math.nan, 0  # as a checkpoint of before may have it
    state.step = 50
    assert state.note_evaluation(1.0)
    assert (state.best_loss, state.best_step, state.stale) == (1.0, 50, 0)
    assert not state.note_evaluation(math.nan)
    assert (state.best_loss, state.best_step, state.stale) == (1.0, 50, 1)


def test_an_infinite_gradient_stops_with_the_step() -> None:
    trainer = tiny.trainer(tiny.decided())
    store = tiny.store()
    steps = tiny.steps(trainer, store, STEPS)
    next(steps)
    first = next(iter(trainer.flat.slots.values()))
    first.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    before = trainer.flat.vector.clone()
    with refused("step 2"):
        next(steps)
    assert torch.equal(trainer.flat.vector, before)


def test_dropout_is_off_outside_steps() -> None:
    trainer = tiny.trainer(tiny.decided(adapter__dropout=0.2))
    list(tiny.steps(trainer, count=1))
    assert not any(layer.training for layer in trainer.adapted.values())
    store = tiny.store(3)
    assert evaluate(trainer, store, "segments").loss == evaluate(trainer, store, "segments").loss


@pytest.mark.parametrize("count", [1, 3, 4, 7])
@pytest.mark.parametrize("micro", [1, 2])
def test_evaluation_takes_every_row(count: int, micro: int) -> None:
    trainer = tiny.moved(tiny.trainer(tiny.decided(train__micro_batch=micro)))
    store = tiny.store(count)
    model = trainer.loss.model
    sums = [
        float(oracle.losses(model, [single]).detach().sum())
        for single in tiny.unpacked([store[i] for i in range(count)])
    ]
    expected = sum(sums) / store.manifest.supervised
    assert evaluate(trainer, store, "segments").loss == pytest.approx(expected, rel=1e-6)
    assert evaluate(trainer, store, "segments", each=True).losses() == pytest.approx(sums, rel=1e-5)


def test_the_number_of_steps_follows_from_epochs_or_is_set() -> None:
    def steps(packs: int, **changes: Any) -> int:
        return total_steps(tiny.decided(**changes).train, packs)

    assert steps(8) == 2
    assert steps(9) == 3  # no sequence is left out
    assert steps(8, train__epochs=2.5) == 5
    assert steps(1, train__epochs=0.1) == 1
    assert steps(8, train__steps=7) == 7
