"""What a worker takes over from another; that all of a group end with the same bytes is shown in test_in_place.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from olora_ray.cluster.membership.peers import Progress, sync_state
from olora_ray.train.checkpoint import TrainState
from tests.crew import Crew


def _synced() -> tuple[int, list[float], list[float]]:
    """On worker 0, which is ahead, all tensors are 7, on worker 1 they are 1."""
    ahead = dist.get_rank() == 0
    mine = torch.full((4,), 7.0 if ahead else 1.0)
    optimizer = SimpleNamespace(moments={"m": mine.clone()}, at=lambda step: None)
    trainer: Any = SimpleNamespace(flat=SimpleNamespace(vector=mine.clone()), optimizer=optimizer)
    being_written = mine.clone()
    evaluator: Any = SimpleNamespace(best=being_written)
    progress = sync_state(Progress(TrainState(step=5 if ahead else 3)), trainer, evaluator)
    assert not progress.torn
    tensors = (being_written, evaluator.best, trainer.flat.vector, optimizer.moments["m"])
    return progress.state.step, [float(each.min()) for each in tensors], [float(each.max()) for each in tensors]


def test_a_checkpoint_that_is_being_written_keeps_its_best_adapter(crew: Callable[[int], Crew]) -> None:
    """It is written by a thread, later; it was overwritten there with that of the other worker, and looked whole."""
    furthest, behind = crew(2).run(_synced)
    assert furthest == (5, [7.0] * 4, [7.0] * 4)
    assert behind == (5, [1.0, 7.0, 7.0, 7.0], [1.0, 7.0, 7.0, 7.0])
