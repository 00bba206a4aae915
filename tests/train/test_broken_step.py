"""A step that a lost worker has broken off is done again without what was computed already."""

from typing import Any

import pytest

from olora_ray.common import collectives
from olora_ray.config.schema import Config
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import StepResult, Trainer
from tests import tiny

STEPS, MICRO_BATCHES = 3, 6


def settings() -> Config:
    batch: dict[str, Any] = {"train__global_batch": MICRO_BATCHES, "train__micro_batch": 1, "train__steps": STEPS}
    return tiny.config(adapter__dropout=0.2, **batch)


def steps(trainer: Trainer, start: int, worker: int = 0, workers: int = 1) -> list[StepResult]:
    """From one step on to the end, with a worker's share."""
    config, store = trainer.config, tiny.store(8)
    loader = StepLoader(store, config.train, config.run.seed, "segments", worker, workers)
    return list(trainer.steps(loader, start, Schedule(config.train, store)))


def outcome(trainer: Trainer, results: list[StepResult]) -> tuple[bytes, list[tuple[int, float, float]]]:
    numbers = [(result.step, result.loss, result.grad_norm) for result in results]
    return trainer.flat.vector.numpy().tobytes(), numbers


def counted(trainer: Trainer) -> list[object]:
    """Grows with each micro-batch that is computed."""
    found: list[object] = []
    trainer.loss.register_forward_hook(lambda *_: found.append(None))
    return found


def lost(*_: object) -> None:
    raise collectives.PeerLost


@pytest.mark.parametrize(("worker", "workers"), [(0, 2), (1, 2), (1, 3), (2, 4)])
def test_only_what_others_had_is_computed_again(worker: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    untouched, trainer = tiny.trainer(settings()), tiny.trainer(settings())
    computed = counted(trainer)
    with monkeypatch.context() as others:
        others.setattr(collectives, "sum_in_place", lost)
        with pytest.raises(collectives.PeerLost):
            steps(trainer, 0, worker, workers)
    assert 0 < len(computed) < MICRO_BATCHES
    results = steps(trainer, 0)
    assert len(computed) == STEPS * MICRO_BATCHES
    assert outcome(trainer, results) == outcome(untouched, steps(untouched, 0))


def test_nothing_of_another_step_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may have done the step that was broken off here: then it goes on with the next one."""
    trainer, ahead = tiny.trainer(settings()), tiny.trainer(settings())
    computed = counted(trainer)
    with monkeypatch.context() as others:
        others.setattr(collectives, "sum_in_place", lost)
        with pytest.raises(collectives.PeerLost):
            steps(trainer, 0, 0, 2)
    computed.clear()
    results = steps(trainer, 1)
    assert len(computed) == (STEPS - 1) * MICRO_BATCHES
    assert outcome(trainer, results) == outcome(ahead, steps(ahead, 1))
