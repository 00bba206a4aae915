"""The backend of Ray Train that connects the workers of a group. Ray Train's controller unpickles it.

Nothing here imports torch in the controller. Ray's own TorchConfig makes the controller import torch before it starts a
worker, which takes about half of the controller's time until then.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


@contextlib.contextmanager
def on_its_device() -> Iterator[None]:
    """Make torch compute on this worker's device, as Ray's TorchConfig does."""
    from ray.train.torch import TorchConfig

    with TorchConfig().train_func_context():
        yield


class TogetherBackend(Backend):
    """Backend that connects a group's workers in one process group before they train. It runs in the controller."""

    # Nothing at the end: Ray ends the processes, and after a loss the others may still wait in an exchange.

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        store = worker_group.execute_single(0, meeting_place)
        world = len(worker_group)
        backend = backend_config.backend
        calls = [
            worker_group.execute_single_async(rank, join_process_group, backend, rank, world, store)
            for rank in range(world)
        ]
        ray.get(calls)


@dataclass
class Together(BackendConfig):
    backend: str | None = None
    """nccl or gloo, as set by TorchTrainer."""

    @property
    def backend_cls(self) -> type[Backend]:
        return TogetherBackend

    @property
    def train_func_context(self) -> Any:
        return on_its_device


def meeting_place() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind(("", 0))
        return address, int(free.getsockname()[1])


def join_process_group(backend: str, rank: int, world: int, store: tuple[str, int]) -> None:
    """Join torch's process group in this worker, and set torchrun's environment variables. All workers must call it."""
    import ray.train.torch
    import torch.distributed as dist

    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=store[0],
        MASTER_PORT=str(store[1]),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
        ACCELERATE_TORCH_DEVICE=str(
            ray.train.torch.get_device()
        ),  # transformers loads models onto this device
    )
    # Like Ray's TorchConfig: without it, an exchange over NCCL with a lost worker waits for ever.
    if backend == "nccl" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(minutes=30))
