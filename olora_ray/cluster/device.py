"""Device of a Ray process: the GPU that it was given, else the CPU.

That torch sees a GPU says nothing: Ray (2.60) hides a node's GPUs only from processes that were given some of them, so
that one which was given none sees all of them, and they belong to others.
"""

import os
from collections.abc import Mapping, Sequence

import ray
import torch

from olora_ray.common.errors import UserError

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that hold the GPUs which a process sees, NVIDIA's and AMD's; torch counts these, from 0."""


def assigned_device() -> torch.device:
    """Where this task or actor computes; the CPU in a driver and in a process without Ray.

    A worker of Ray Train asks `ray.train.torch.get_device` instead: it sees the GPUs of all workers on its node.
    Raises UserError if torch cannot use the GPU that this process was given.
    """
    given = [str(each) for each in ray.get_gpu_ids()] if ray.is_initialized() else []
    device = device_of(given, os.environ)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"cluster.gpus_per_worker: this process was given GPU {given[0]} of its node, which torch"
            f" {torch.__version__} cannot use; install torch for CUDA there, or set it to 0"
        )
    multiply_exactly(device)
    return device


def multiply_exactly(device: torch.device) -> None:
    """Have this process multiply float32 as float32 on its GPU, whatever its environment says.

    NVIDIA's images for torch set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: products of float32 have three digits then, with
    which a merged weight is not base + change within one rounding, as its check has it.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")


def device_of(given: Sequence[str], environment: Mapping[str, str]) -> torch.device:
    """The device of a process with this environment, which was given these GPUs of its node."""
    if not given:
        return torch.device("cpu")
    seen = next((environment[name].split(",") for name in VISIBLE if environment.get(name)), None)
    if seen is None:  # all of the node's: Ray was told not to hide them
        return torch.device("cuda", int(given[0]))
    return torch.device("cuda", seen.index(given[0]) if given[0] in seen else 0)
