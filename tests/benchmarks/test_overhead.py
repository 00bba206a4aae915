"""The overhead is read from what runs leave; the side without Ray trains as a run of the product does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from olora_ray.config.load import load_config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train.checkpoints import name_of, names
from tests.pipelines import project


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
    monkeypatch.setattr(
        module, "prepare_device", lambda config, device: None
    )  # it is for good in this process
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
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
