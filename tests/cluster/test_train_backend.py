"""The process group that Train's controller asks the workers for."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_ray.cluster.train_backend import Together


def _work(config: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "ACCELERATE_TORCH_DEVICE")
    told = [dist.get_rank(), dist.get_world_size(), dist.get_backend(), total.item(), *(os.environ[n] for n in names)]
    Path(config["folder"], str(dist.get_rank())).write_text(json.dumps(told))


@pytest.mark.ray
def test_the_workers_of_a_group_meet_as_under_torchrun(ray_with: Callable[[int], None], tmp_path: Path) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    ray_with(2)
    together: Any = Together()
    TorchTrainer(
        _work,
        train_loop_config={"folder": str(tmp_path)},
        torch_config=together,
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="here", storage_path=str(tmp_path / "runs")),
    ).fit()
    for rank in (0, 1):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found == [rank, 2, "gloo", 2.0, str(rank), "2", str(rank), "2", "0", "cpu"]
