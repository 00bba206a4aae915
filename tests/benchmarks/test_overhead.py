"""The overhead is read from what runs leave; the side without Ray trains as a run of the product does."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from olora_ray.cluster.spec import TrainResult
from olora_ray.config.load import load_config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train.checkpoint import MANIFEST, TrainState
from olora_ray.train.checkpoints import name_of, names
from tests.pipelines import project


def make_run(folder: Path, steps: int, seconds: float, between: float, waited: float) -> Path:
    """What a run of so many steps leaves; checkpoints every quarter."""
    state = TrainState(steps)
    for step in range(1, steps + 1):
        slow = 10.0 if step == 1 else 1.0
        state.record(step, {"train/step_seconds": seconds * slow, "data/wait_fraction": waited})
    state.record(steps, {"eval/loss": 1.0})
    for step in (0, steps // 4, steps):
        place = folder / "checkpoints" / name_of(step)
        place.mkdir(parents=True)
        (place / MANIFEST).write_text("{}")
        os.utime(place / MANIFEST, (0, 1000.0 + step * (seconds + between)))
    RunFolder(str(folder)).write_training(TrainResult(state=state))
    return folder


def test_what_lies_between_steps_counts_and_the_first_steps_do_not(benchmark: Any, tmp_path: Path) -> None:
    module = benchmark("overhead")
    found = module.recorded(make_run(tmp_path / "a", 8, 0.5, 0.1, 0.004), 8)
    assert (found.step, found.whole, found.waiting) == (0.5, pytest.approx(0.6), pytest.approx(0.004))
    assert math.isnan(found.others)


def test_the_side_without_ray_trains_and_leaves_what_is_read(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, overhead = benchmark("under_torchrun"), benchmark("overhead")
    project.make_tiny(tmp_path)
    overhead.write_corpus(tmp_path / "train.jsonl", 40)
    tree = project.settings(tmp_path, tmp_path / "model", cluster={"workers": 1})
    tree["data"] |= {"eval": [], "max_length": 1024}
    tree["train"] |= {"steps": 4, "checkpoint_every": 1, "keep": 9}
    tree["evaluation"] = {"samples": 0}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(tree))
    monkeypatch.setattr(module, "prepare_device", lambda config, device: None)  # it is for good in this process
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        module.main(str(file))
    finally:
        dist.destroy_process_group()
    folder = RunFolder(load_config(file).folder())
    assert names(folder.checkpoints) == [name_of(step) for step in range(5)]
    found = overhead.recorded(Path(folder.root), 4)
    assert found.step > 0
    assert found.whole > 0
    assert 0 <= found.waiting < 1
