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

LOOPBACK = "lo"
"""Linux's name of the interface that only processes on the same machine reach."""


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
        nodes = worker_group.execute(own_node)
        store = worker_group.execute_single(0, open_store, len(set(nodes)) == 1)
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


def own_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


@dataclass(frozen=True)
class Store:
    """The store of a process group, which rank 0 has opened: a file in its memory, or a socket that listens.

    Anybody who reaches the socket may write, so only workers on several nodes use one. The file is open to processes
    of the same user, and is gone when rank 0 ends.
    """

    descriptor: int
    """Number of the open file in rank 0's process."""
    file: str = ""
    address: str = ""
    port: int = 0


def open_store(one_node: bool) -> Store:
    if one_node:
        file = os.memfd_create("olora-store")
        return Store(file, f"/proc/{os.getpid()}/fd/{file}")
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # The port is bound from now on, so that no other process can take it.
    listening = socket.create_server((address, 0), family=family)
    port = int(listening.getsockname()[1])
    return Store(listening.detach(), "", address, port)


def join_process_group(backend: str, rank: int, world: int, store: Store) -> None:
    """Join torch's process group in this worker, and set torchrun's environment variables. All workers must call it."""
    import ray.train.torch

    context = ray.train.get_context()
    os.environ.update(
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
    connect(backend, rank, world, store)


def connect(backend: str, rank: int, world: int, store: Store) -> None:
    import torch.distributed as dist

    limit = timedelta(minutes=30)
    meeting: Any
    if store.file:
        # No other machine can connect to the workers then.
        if LOOPBACK in [name for _, name in socket.if_nameindex()]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
        meeting = dist.FileStore(store.file, world)  # type: ignore[attr-defined]
    else:
        listening = store.descriptor if rank == 0 else None
        meeting = dist.TCPStore(  # type: ignore[attr-defined]
            store.address, store.port, world, rank == 0, limit, master_listen_fd=listening
        )
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=world, timeout=limit)
