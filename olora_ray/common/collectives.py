"""Exchanges between the workers of a training: the only file that calls the collectives of torch.distributed.

All workers must call each function, in the same order. Without a process group, a process is a group of one, and each
function returns at once.

Values travel as tensors and JSON, never pickled: another process in the network could send a pickle that runs code.

An exchange raises PeerLost if another worker is lost; the received data is invalid then. Some of the workers may not
notice the loss by themselves: the driver ends the group.
"""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from olora_ray.common.device import is_of_gpu
from olora_ray.common.errors import TryAgain, UserError

Value = TypeVar("Value")

_meetings = itertools.count()


class PeerLost(Exception):
    """Another worker, or the connection to it, is lost."""


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no narrower type for the errors of gloo
        if is_of_gpu(error):
            raise
        raise PeerLost(str(error).partition("\n")[0]) from error


def rank() -> int:
    """Return the rank of this worker; 0 without a process group."""
    if not dist.is_initialized():
        return 0
    return dist.get_rank()


def world_size() -> int:
    """Return the number of workers; 1 without a process group."""
    if not dist.is_initialized():
        return 1
    return dist.get_world_size()


def machines() -> tuple[range, ...]:
    """Return the ranks of each machine; a machine whose workers have no adjacent ranks counts as several."""
    ranges = []
    first = 0
    for _, run in itertools.groupby(gather(socket.gethostname())):
        end = first + len(list(run))
        ranges.append(range(first, end))
        first = end
    return tuple(ranges)


def sum_in_place(tensor: Tensor) -> None:
    if world_size() > 1:
        with _peers():
            dist.all_reduce(tensor)


def broadcast_in_place(tensor: Tensor, source: int) -> None:
    if world_size() > 1:
        with _peers():
            dist.broadcast(tensor, src=source)


def swap(outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Send `outgoing[w]` (flat, uint8) to each worker w, and return the tensor received from each, of `sizes[w]` bytes.

    All tensors are on one device. The caller knows the sizes, so they are not sent.
    """
    here = rank()
    received = [
        torch.empty(size, dtype=torch.uint8, device=outgoing[here].device) for size in sizes
    ]
    received[here] = outgoing[here]
    others = [worker for worker in range(world_size()) if worker != here]
    transfer(
        [(worker, outgoing[worker]) for worker in others],
        [(worker, received[worker]) for worker in others],
    )
    return received


def transfer(
    outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]
) -> None:
    """Send each outgoing tensor to the worker beside it, and fill each incoming tensor from the worker beside it.

    Tensors are flat, contiguous and on one device. Tensors between the same two workers arrive in the listed order, so
    both workers must list the same sizes. Empty tensors are not sent.
    """
    operations = [
        dist.P2POp(dist.isend, tensor, worker) for worker, tensor in outgoing if len(tensor)
    ]
    operations += [
        dist.P2POp(dist.irecv, tensor, worker) for worker, tensor in incoming if len(tensor)
    ]
    if operations:
        with _peers():
            for operation in dist.batch_isend_irecv(operations):
                operation.wait()


def from_first(value: Value) -> Value:
    return gather(value)[0]


def gather(value: Value) -> list[Value]:
    """Return the values of all workers in the order of their ranks. They travel as JSON, so tuples become lists."""
    text = json.dumps(value).encode()
    if world_size() == 1:
        return [json.loads(text)]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    sizes = _of_all(torch.tensor([len(text)], device=device))
    longest = max(int(size) for size in sizes)
    own = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    return [json.loads(part.cpu().numpy().tobytes()) for part in _of_all(own)]


def _of_all(own: Tensor) -> list[Tensor]:
    every = [torch.empty_like(own) for _ in range(world_size())]
    with _peers():
        dist.all_gather(every, own)
    return every


def wait_for_all(seconds: float = 0.5) -> None:
    """Wait until all workers have called it, without the timeout of an exchange; poll every `seconds`.

    A worker that dies is not noticed here: Ray must end the whole group then. Raises PeerLost if the process that
    holds the group's store is lost, and the store is a socket.
    """
    if world_size() == 1:
        return
    key = f"all-here-{next(_meetings)}"
    with _peers():
        store = dist.distributed_c10d._get_default_store()
        if store.add(key, 1) == world_size():
            store.set(f"{key}-now", "")
        # Reading only, because a store that is a file grows with each write.
        while not store.check([f"{key}-now"]):
            time.sleep(seconds)


def raise_together(problem: UserError | str | None) -> None:
    """Raise the first worker's problem on all workers, as UserError or TryAgain. Does nothing if no worker has one.

    If one worker raised alone, the others would wait for it in their next exchange.
    """
    here = (str(problem or ""), isinstance(problem, TryAgain))
    for text, later in gather(here):
        if text and later:
            raise TryAgain(text)
        if text:
            raise UserError(text)


def together(work: Callable[[], Value]) -> Value:
    """Return the result of `work`; a UserError of one worker is raised on all workers (`raise_together`)."""
    problem = None
    results = []
    try:
        results.append(work())
    except UserError as error:
        problem = error
    raise_together(problem)
    return results[0]


def share(count: int, worker: int, workers: int) -> range:
    """Return the part of `range(count)` that is for this worker. It is empty for some workers if count < workers."""
    return range(worker * count // workers, (worker + 1) * count // workers)
