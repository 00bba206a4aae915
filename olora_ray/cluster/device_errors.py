"""Errors of a worker's device, told with the plan of its memory and with advice."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.distributed import DistError

from olora_ray.common.device import is_of_gpu, is_out_of_memory, is_short, memory_of
from olora_ray.common.errors import UserError, first_line
from olora_ray.config.decided import DecidedConfig
from olora_ray.train.checkpoint import TrainState

logger = logging.getLogger(__name__)

LONGEST = 200
FIRST = 2
"""Steps of a worker in which its GPU's memory takes its final form: an error there would come again."""


@dataclass
class Progress:
    """Steps of a run, and of its present worker."""

    config: DecidedConfig
    state: TrainState = field(default_factory=TrainState)
    began: int = 0
    """Steps that the run had done when this worker started."""


@contextlib.contextmanager
def advice_for_device(
    config: DecidedConfig, device: torch.device, planned: int = 0
) -> Iterator[Progress]:
    """Raise a UserError for an error of the device that would come again after a restart.

    These are a lack of memory, and on a GPU each error before the run's first steps are done. `planned` are the bytes
    that the plan expects on the device.
    """
    progress = Progress(config)
    try:
        yield progress
    except RuntimeError as error:  # errors of GPUs have no narrower type in common
        if isinstance(error, DistError) and not is_of_gpu(error):
            raise
        config = progress.config
        step = progress.state.step
        first = step < progress.began + FIRST
        if is_out_of_memory(error) or (first and is_short(device)):
            problem = (
                f"a worker has too little memory for train.micro_batch={config.train.micro_batch} and"
                f" data.max_length={config.data.max_length}"
            )
            advice = f"set {_smaller(config)}"
        elif device.type == "cuda" and step < FIRST:
            problem = f"cluster.gpus_per_worker: the GPU of a worker fails on {socket.gethostname()} in step {step + 1}"
            advice = (
                f"check its driver (nvidia-smi, dmesg), and that torch {torch.__version__} supports it, or use another"
                " node"
            )
        else:
            raise
        logger.debug("the device has failed", exc_info=True)
        raise UserError(
            f"{problem}{_memory(device, planned)}: {advice} ({first_line(error)[:LONGEST]})"
        ) from error


def _memory(device: torch.device, planned: int) -> str:
    memory = memory_of(device)
    if memory is None:
        return ""
    free, total = (size / 2**30 for size in memory)
    plan = f", and {planned / 2**30:.1f} GiB were planned" if planned else ""
    return f" ({free:.1f} of {total:.1f} GiB of its GPU are free{plan})"


def _smaller(config: DecidedConfig) -> str:
    micro = config.train.micro_batch
    changes = []
    if micro > 1:
        changes.append(f"train.micro_batch={micro // 2}")
    elif config.train.activation_checkpointing is not True:
        changes.append("train.activation_checkpointing=true")
    changes.append(f"data.max_length={config.data.max_length // 2}")
    return " or ".join(changes)
