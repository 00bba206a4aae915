"""What Ray Train unpacks to start workers: the backend of a group, and the first moment of a worker.

Nothing here imports torch before a worker trains: Ray's own TorchConfig has the controller import it before it starts
a worker, about half of the time that the controller takes until then.
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

# Workers that stay together: they meet once, and fail as a whole.


@contextlib.contextmanager
def on_its_device() -> Iterator[None]:
    """Let torch compute on the device of this worker, as under Ray's TorchConfig."""
    from ray.train.torch import TorchConfig

    with TorchConfig().train_func_context():
        yield


class TogetherBackend(Backend):
    """Has the workers of a group meet before they train, and part afterwards; runs in the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """See Backend."""
        place, world = worker_group.execute_single(0, meeting_place), len(worker_group)
        backend = backend_config.backend
        asked = [
            worker_group.execute_single_async(rank, join_process_group, backend, rank, world, place)
            for rank in range(world)
        ]
        ray.get(asked)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """See Backend."""
        try:
            ray.get(worker_group.execute_async(leave_process_group, len(worker_group) > 1), timeout=30)
        except GetTimeoutError:
            logger.warning("workers did not leave their process group within 30 s")


@dataclass
class Together(BackendConfig):
    """In place of Ray's TorchConfig."""

    backend: str | None = None
    """nccl or gloo; TorchTrainer says which."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See BackendConfig."""
        return TogetherBackend

    @property
    def train_func_context(self) -> Any:
        """See BackendConfig."""
        return on_its_device


def meeting_place() -> tuple[str, int]:
    """Return the address of this worker's node and a free port, at which the workers of a group meet."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind(("", 0))
        return address, int(free.getsockname()[1])


def join_process_group(backend: str, rank: int, world: int, place: tuple[str, int]) -> None:
    """Join torch's process group in this worker, and set what torchrun would in its environment; all must call it."""
    import ray.train.torch
    import torch.distributed as dist

    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=place[0],
        MASTER_PORT=str(place[1]),
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
        ACCELERATE_TORCH_DEVICE=str(ray.train.torch.get_device()),  # transformers loads onto this one
    )
    if backend == "nccl" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray's TorchConfig: fail after a timeout
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(minutes=30))


def leave_process_group(several: bool) -> None:
    """Leave the process group, where several workers have joined, and give back this worker's memory of its GPU."""
    import torch
    import torch.distributed as dist

    if several and dist.is_initialized():
        dist.destroy_process_group()
    torch.cuda.empty_cache()  # nothing, in a process that has used no GPU


# Workers that come and go.


class InPlaceBackend(Backend):
    """Ray replaces a worker that failed and leaves the rest alone; the workers connect by themselves (peers.py)."""

    # Ray 2.60, train/v2/_internal/execution/controller: meant for torchft, and read from the backend's class.
    has_replica_groups = True
    share_cuda_visible_devices = True


class InPlace(Together):
    """As Together, but no process group is made for the workers."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See BackendConfig."""
        return InPlaceBackend

    @property
    def train_func_context(self) -> Any:
        """See BackendConfig; a worker enters its device's context later (LateStart), since that imports torch."""
        return contextlib.nullcontext


@dataclass(frozen=True)
class LateStart:
    """What Ray Train calls in a worker that may come while others train.

    Ray replaces a lost worker at once. If a spare has taken its place meanwhile, the replacement is the next spare and
    nobody waits for it; but its imports and the loading of the base would take processors from the step that has to be
    done again. So it waits until a step is done, and only then unpacks what it works with.
    """

    channel: Any
    work: bytes
    """A function of the channel, pickled by Ray's cloudpickle: to unpickle it imports torch."""

    def __call__(self) -> Any:
        """Wait for the moment, then work; returns what the work does, or that nothing was left to do."""
        if not ray.get(self.channel.moment_to_start.remote()):
            from olora_ray.cluster.spec import LEFT, TrainResult

            return TrainResult(interrupted=LEFT)
        with on_its_device():
            return ray.cloudpickle.loads(self.work)(self.channel)
