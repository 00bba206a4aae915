"""The same bytes with any number of workers: adapter, optimizer, losses, norms, evaluations and answers.

Each case is trained by one process to its end, and a checkpoint is kept on the way. Then groups of 2 to 5 real workers
train it from its start, and from that checkpoint, so that any change of their number leads to the same end.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_ray.cluster.start import resume
from olora_ray.common import collectives
from olora_ray.config.schema import Config
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.generate import Question, answer
from olora_ray.train.held_out import evaluate
from olora_ray.train.loader import Schedule, StepLoader
from tests import tiny
from tests.crew import Crew

CASES = 8
STOP = 3
"""Steps of a case."""
QUESTIONS = [Question(tuple(range(5, 5 + length)), ()) for length in (4, 9, 2, 6, 3)]


@dataclass(frozen=True)
class Case:
    batch: int
    micro: int
    packing: bool
    held_out: int
    """Sequences of the evaluation."""
    changes: dict[str, Any]
    cut: int
    """The step after which the checkpoint is kept."""

    def config(self, strategy: str) -> Config:
        size = {"train__global_batch": self.batch, "train__micro_batch": self.micro}
        return tiny.decided(cluster__strategy=strategy, train__steps=STOP, **size, **self.changes)


def drawn(number: int) -> Case:
    """Draw a case; every second case has dropout, and every third no packing."""
    chance = random.Random(number + 5)  # such that there are cases of all kinds
    changes = {
        "adapter__dropout": 0.2 if number % 2 else 0.0,
        "train__clip": chance.choice([None, 0.05]),
        "train__optimizer": chance.choice(["adamw", "preconditioned", "spectral"]),
        "train__lr_ratio": chance.choice([1.0, 4.0]),
    }
    batch, micro = chance.randint(1, 18), chance.choice([1, 2, 3])
    return Case(
        batch, micro, number % 3 > 0, chance.randint(1, 9), changes, chance.randint(1, STOP - 1)
    )


@dataclass
class Outcome:
    """The results that must be the same."""

    steps: list[tuple[float, float]]
    """Loss and norm of the gradient."""
    adapter: Tensor
    optimizer: dict[str, Tensor]
    held_out: list[float]
    answers: list[list[int]]

    def differences(self, other: "Outcome") -> list[str]:
        found = [
            name for name in ("held_out", "answers") if getattr(self, name) != getattr(other, name)
        ]
        if self.steps != other.steps[-len(self.steps) :]:
            found.append("steps")
        if not torch.equal(self.adapter, other.adapter):
            found.append("adapter")
        return found + [
            name
            for name, part in self.optimizer.items()
            if not torch.equal(part, other.optimizer[name])
        ]


def trained(
    case: Case, strategy: str, start: Path | None, stop: int, end: Path | None = None
) -> Outcome:
    """Train up to a step, from the checkpoint `start` if it is set, with all workers of this process's group."""
    attention = "segments" if case.packing else "sdpa"
    store = tiny.store(8)
    if not case.packing:
        store = tiny.ListStore(tiny.unpacked([store[i] for i in range(8)]))
    settings = case.config(strategy)
    trainer = tiny.trainer(settings, attention, strategy=strategy)
    state = TrainState()
    if start:
        found = checkpoint.load(start)
        resume(trainer, found)
        state = found.state
    rank, workers = collectives.rank(), collectives.world_size()
    loader = StepLoader(store, settings.train, settings.run.seed, attention, rank, workers)
    schedule = Schedule(settings.train, store)
    steps = []
    for result in trainer.steps(loader, state.step, schedule):
        steps.append((result.loss, result.grad_norm))
        state.step = result.step
        if result.step == stop:
            break
    rows = tiny.store(case.held_out, seed=9)
    held_out = [evaluate(trainer, rows, attention).loss]
    held_out += evaluate(trainer, rows, attention, each=True).losses()
    answers = answer(trainer, QUESTIONS, 3, [1], rank, workers, batch=2)
    if end and rank == 0:
        trainer.snapshot(state, None, {}, "")(end)
    optimizer = {name: part.clone() for name, part in trainer.optimizer.state().items()}
    return Outcome(steps, trainer.flat.vector.clone(), optimizer, held_out, answers)


@contextmanager
def group_of(workers: int) -> Iterator[Crew]:
    """Start a group, and end it at once afterwards, because several groups together take much memory."""
    crew = Crew(workers)
    try:
        yield crew
    finally:
        crew.close()


Known = list[tuple[Case, Path, Outcome]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """The cases, their checkpoints, and the final results of a single process."""
    found = []
    for case in map(drawn, range(CASES)):
        place = tmp_path_factory.mktemp("alone") / "checkpoint"
        trained(case, "ddp", None, case.cut, place)
        found.append((case, place, trained(case, "ddp", None, STOP)))
    return found


@pytest.mark.parametrize(
    "workers", [3, *(pytest.param(more, marks=pytest.mark.slow) for more in (2, 4, 5))]
)
def test_any_number_of_workers_gives_the_same_bytes(alone: Known, workers: int) -> None:
    """From the start with ddp and from the checkpoint with fsdp, so that any change in between is covered."""
    jobs = [(case, "ddp", None) for case, *_ in alone] + [
        (case, "fsdp", place) for case, place, _ in alone
    ]
    with group_of(workers) as crew:
        found = crew.run(_all_trained, jobs)
    for outcomes in found:
        for (case, strategy, _), outcome, (*_, end) in zip(
            jobs, outcomes, [*alone, *alone], strict=True
        ):
            assert outcome.differences(end) == [], (strategy, case)


def test_workers_may_come_and_go(alone: Known, tmp_path: Path) -> None:
    """One step each with three workers, with two, and with one."""
    case, _, end = max(alone, key=lambda known: known[0].config("ddp").train.micro_batches())
    places = [tmp_path / str(step) for step in (1, 2)]
    with group_of(3) as crew:
        crew.run(trained, case, "fsdp", None, 1, places[0])
    with group_of(2) as crew:
        crew.run(trained, case, "ddp", places[0], 2, places[1])
    assert trained(case, "ddp", places[1], STOP).differences(end) == []


def _all_trained(jobs: list[tuple[Case, str, Path | None]]) -> list[Outcome]:
    return [trained(case, strategy, start, STOP) for case, strategy, start in jobs]
