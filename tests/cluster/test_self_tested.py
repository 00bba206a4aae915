"""The self-test of a group of workers: what fails on one of them ends all, with its line."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from olora_ray.cluster.resume import StartingPoint
from olora_ray.cluster.self_tested import self_tested
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.train.state import TrainState
from tests import tiny
from tests.crew import Crew


def _tested(wrong: int | None) -> tuple[str, list[int]]:
    """The attention that all take; on worker `wrong` an adapter does not start where the base is."""
    settings = tiny.config(cluster__workers=2)
    trainer = tiny.trainer(settings)
    if dist.get_rank() == wrong:
        trainer.flat.vector[3] = 0.5
    start = StartingPoint(trainer, "segments", TrainState(), None, resumed=False)
    context: Any = SimpleNamespace(activate=lambda adapted: contextlib.nullcontext(), device=torch.device("cpu"))
    spec: Any = SimpleNamespace(config=settings, train=tiny.store(3))
    found = self_tested(context, spec, start)
    return found.attention, collectives.gather(dist.get_rank())


def test_all_workers_pass_together(crew: Callable[[int], Crew]) -> None:
    assert crew(2).run(_tested, None) == [("segments", [0, 1])] * 2


def test_what_fails_on_one_worker_ends_all_with_its_line(crew: Callable[[int], Crew]) -> None:
    for wrong in (0, 1):
        errors = crew(2).run(_tested, wrong)
        assert [type(error) for error in errors] == [UserError, UserError]
        assert "with untrained adapters differs by" in str(errors[0])
        assert str(errors[0]) == str(errors[1])
    assert crew(2).run(collectives.rank) == [0, 1], "nobody waits for another"
