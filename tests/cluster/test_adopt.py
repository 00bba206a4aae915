"""What a worker takes over from another; that all of a group end with the same bytes is shown in test_in_place.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olora_ray.cluster import adopt
from olora_ray.cluster.adopt import Progress
from olora_ray.common import collectives
from olora_ray.train.checkpoint import TrainState


def test_a_checkpoint_that_is_being_written_keeps_its_best_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written by a thread, later; it was overwritten there with that of the other worker, and looked whole."""
    ahead = Progress(TrainState(step=5))
    monkeypatch.setattr(collectives, "rank", lambda: 0)
    monkeypatch.setattr(collectives, "gather", lambda mark: [mark, ahead.mark()])
    monkeypatch.setattr(collectives, "from_one", lambda value, source: (ahead, True))
    monkeypatch.setattr(collectives, "broadcast_in_place", lambda tensor, source: tensor.fill_(7.0))
    optimizer = SimpleNamespace(moments={"m": torch.zeros(4)}, at=lambda step: None)
    trainer: Any = SimpleNamespace(flat=SimpleNamespace(vector=torch.zeros(4)), optimizer=optimizer)
    being_written = torch.ones(4)
    evaluator: Any = SimpleNamespace(best=being_written)
    assert adopt.adopt(Progress(TrainState(step=3)), trainer, evaluator) is ahead
    assert torch.equal(being_written, torch.ones(4))
    for tensor in (evaluator.best, trainer.flat.vector, optimizer.moments["m"]):
        assert torch.equal(tensor, torch.full((4,), 7.0))
