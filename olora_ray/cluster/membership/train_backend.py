"""Objects that Ray Train's controller unpickles to start workers: the backend of a group, and the start of a worker.

Nothing here imports torch before a worker trains. Ray's own TorchConfig makes the controller import torch before it
starts a worker, which takes about half of the controller's time until then.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

logger = logging.getLogger(__name__)

# Workers of a fixed group: they connect once, and when one fails, all restart.


@contextlib.contextmanager
def on_its_device() -> Iterator[None]:
    """Make torch compute on this worker's device, as Ray's TorchConfig does."""
    from ray.train.torch import TorchConfig

    with TorchConfig().train_func_context():
        yield


class TogetherBackend(Backend):
    """Backend that connects a group's workers in one process group before they train. It runs in the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        store, world = worker_group.execute_single(0, meeting_place), len(worker_group)
        backend = backend_config.backend
        calls = [
            worker_group.execute_single_async(rank, join_process_group, backend, rank, world, store)
            for rank in range(world)
        ]
        ray.get(calls)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            ray.get(worker_group.execute_async(leave_process_group, len(worker_group) > 1), timeout=30)
        except GetTimeoutError:
            logger.warning("workers did not leave their process group within 30 s")


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
        ACCELERATE_TORCH_DEVICE=str(ray.train.torch.get_device()),  # transformers loads models onto this device
    )
    # Like Ray's TorchConfig: without it, an exchange over NCCL with a lost worker waits for ever.
    if backend == "nccl" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(minutes=30))


def leave_process_group(several: bool) -> None:
    import torch
    import torch.distributed as dist

    if several and dist.is_initialized():
        dist.destroy_process_group()
    torch.cuda.empty_cache()  # does nothing in a process that has not used a GPU


# Workers that may join and leave during a training.


class InPlaceBackend(Backend):
    """Backend with which Ray replaces only the worker that failed. The workers connect by themselves (peers.py)."""

    # Ray 2.60, train/v2/_internal/execution/controller, reads this from the backend's class. It was made for torchft.
    has_replica_groups = True
    share_cuda_visible_devices = True


class InPlace(Together):
    """Backend of workers that may join and leave: Ray creates no process group for them."""

    @property
    def backend_cls(self) -> type[Backend]:
        return InPlaceBackend

    @property
    def train_func_context(self) -> Any:
        # The context of the device imports torch, so a worker enters it later, in LateStart.
        return contextlib.nullcontext


@dataclass(frozen=True)
class LateStart:
    """The function that Ray Train calls in a worker that may join while others train.

    Ray replaces a lost worker at once. If a spare has already taken its place, the replacement becomes the next spare,
    and nobody waits for it. But its imports, and the loading of the base, would take CPU time from the step that the
    others must repeat. So it waits until they have done a step, and only then imports torch.
    """

    channel: Any
    work: bytes
    """A pickled function of the channel. To unpickle it imports torch."""

    def __call__(self) -> Any:
        if not ray.get(self.channel.moment_to_start.remote()):
            from olora_ray.cluster.spec import LEFT, TrainResult

            return TrainResult(interrupted=LEFT)
        with on_its_device():
            return ray.cloudpickle.loads(self.work)(self.channel)
