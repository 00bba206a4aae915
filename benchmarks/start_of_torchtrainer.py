"""The peer of benchmarks/start.py that a Ray user writes by hand: TorchTrainer and PEFT, to the end of the first step.

python benchmarks/start_of_torchtrainer.py FOLDER DTYPE WORKERS      (prints when that was; joins RAY_ADDRESS's Ray)
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

HERE = str(Path(__file__).parent)


def train(settings: dict[str, Any]) -> None:
    sys.path.insert(0, HERE)
    import numpy as np
    import ray.train.torch
    import torch
    from peers import model_of_peft
    from start_of_peft import LENGTH

    rank = ray.train.get_context().get_world_rank()
    model = model_of_peft(settings["folder"], getattr(torch, settings["dtype"]), rank=16)
    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=2e-4
    )
    ids = torch.from_numpy(np.random.default_rng(rank).integers(3, 40_000, (1, LENGTH)))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    if rank == 0:
        Path(settings["told"]).write_text(str(time.time()))


def main() -> None:
    folder, dtype, workers = str(Path(sys.argv[1]).resolve()), sys.argv[2], int(sys.argv[3])
    ray.init(logging_level="warning", log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch, "told")
        settings = {"folder": folder, "dtype": dtype, "told": str(told)}
        scaling = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1})
        TorchTrainer(train, train_loop_config=settings, scaling_config=scaling,
                     run_config=RunConfig(storage_path=scratch)).fit()  # fmt: skip
        print(told.read_text(), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
