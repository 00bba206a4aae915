"""A worker of benchmarks/overhead.py under torchrun: the training of cluster/worker.py without Ray.

python -m torch.distributed.run --standalone --nproc-per-node=2 benchmarks/under_torchrun.py CONFIG

It trains as pipelines/finetune.py does with the config, on the token store of an earlier run (a small store is prepared
here), and writes the run's checkpoints and training.json.
"""

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from common import decided

from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.start import starting_point
from olora_ray.cluster.worker import Worker
from olora_ray.cluster.worker_context import RayTrainContext, prepare_device
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.load import load_config
from olora_ray.config.schema import Config
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.prepare import begin
from olora_ray.tokens.store import TokenStore


class TorchrunContext(RayTrainContext):
    """The context of a worker that torchrun has started on a CPU, instead of Ray Train's."""

    def __init__(self, config: Config) -> None:
        self.device, self._loss, self._installed = torch.device("cpu"), None, False
        prepare_device(config, self.device)


class NobodyAsks:
    """Replacement of StopRequests, because there is no driver that could ask for a stop."""

    def waiting(self, shard: int, shards: int) -> None:
        """The store is complete."""

    def pending(self) -> bool:
        return False

    def reason(self) -> str:
        raise AssertionError("nobody has asked")


def main(file: str) -> None:
    quiet_transformers()
    config = decided(load_config(file))
    dist.init_process_group("gloo")
    result = train(TorchrunContext(config), config)
    if result.problem or result.state is None:
        raise SystemExit(f"training has failed: {result.problem}")
    if dist.get_rank() == 0:
        RunFolder(config.folder()).write_training(result)
    dist.barrier()


def train(context: TorchrunContext, config: Config) -> TrainResult:
    base, folder, requests = open_base(config), RunFolder(config.folder()), NobodyAsks()
    if context.rank == 0:
        begin(config, base.spec, "train").run()
    dist.barrier()
    store = TokenStore.open(begin(config, base.spec, "train").store.uri)
    spec = TrainSpec(config, base.model, base.spec.digest, base.eos, store, None)
    nobody: Any = SimpleNamespace(send=SimpleNamespace(remote=lambda message: None))
    start = starting_point(context, spec, folder.checkpoints, requests.waiting)
    asked: Any = requests
    return Worker(context, spec, folder.checkpoints, nobody, start, asked).run()


if __name__ == "__main__":
    main(sys.argv[1])
    # Threads of a process group can crash when the interpreter exits. All files are written already, so skip the exit.
    sys.stdout.flush()
    os._exit(0)
