"""Exchanges between the workers of a training: the only file that calls the collectives of torch.distributed.

Every function must be called by all workers, in the same order. In a process without a process group, or alone in
one, they return at once: one process is a group of one.

Where an exchange fails because another worker is gone, PeerLost is raised; what was received is worthless then. Which
of the others notice is not certain, so all have to end what they are at (`abort`), and form another group.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from olora_ray.common.errors import TryAgain, UserError

Value = TypeVar("Value")

_stores: list[TCPStore] = []
PATIENCE = timedelta(minutes=30)
"""Within which an exchange ends, the waiting for slower workers included."""
ABORT = timedelta(milliseconds=1)
_meetings = itertools.count()
NOBODY = 2**20 + 1
"""A tag that no message has."""


class PeerLost(Exception):
    """Another worker is gone, or the connection to it."""


def meeting_place(host: str) -> tuple[str, int]:
    """Host and port of a store at which groups can meet (`join_group`), as long as this process lives."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    return host, store.port


def join_group(address: tuple[str, int], name: str, rank: int, size: int, seconds: float) -> None:
    """Connect with the other workers of a new group over gloo; all must call it together, within so many seconds.

    They meet at the TCPStore at `address`; no other group that does so has this name. Raises PeerLost.
    """
    limit = timedelta(seconds=seconds)
    with _peers():
        store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=limit)
        prefixed = PrefixStore(name, store)
        dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size, timeout=limit)
        dist.distributed_c10d._set_pg_timeout(PATIENCE, dist.group.WORLD)


def abort() -> None:
    """End what this process is exchanging, from another thread: it raises PeerLost there, and soon on the others too.

    gloo has no such call, but a receiver that has waited for too long closes all connections of the group.
    """
    if world_size() > 1:
        with contextlib.suppress(RuntimeError, ValueError):
            nothing: Any = dist.irecv(torch.empty(1), (rank() + 1) % world_size(), tag=NOBODY)
            nothing.wait(ABORT)


def leave_group() -> None:
    """Close all connections, so that the others notice; then this process is alone."""
    if dist.is_initialized():
        abort()
        dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no narrower one for gloo
        raise PeerLost(str(error).partition("\n")[0]) from error


def rank() -> int:
    """Number of this worker; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_in_place(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all workers."""
    if world_size() > 1:
        with _peers():
            dist.all_reduce(tensor)


def broadcast_in_place(tensor: Tensor, source: int) -> None:
    """Replace a tensor by that of the worker `source`."""
    if world_size() > 1:
        with _peers():
            dist.broadcast(tensor, src=source)


def swap(outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Send `outgoing[w]` (bytes, uint8, flat) to each worker w; what each worker w has sent here, of `sizes[w]` bytes.

    All on one device; sizes are known beforehand, so that nothing but the bytes travels.
    """
    here = rank()
    received = [torch.empty(size, dtype=torch.uint8, device=outgoing[here].device) for size in sizes]
    received[here] = outgoing[here]
    others = [worker for worker in range(world_size()) if worker != here]
    transfer([(worker, outgoing[worker]) for worker in others], [(worker, received[worker]) for worker in others])
    return received


def transfer(outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]) -> None:
    """Send tensors to the workers named beside them, and fill tensors with what these workers send here.

    Flat and contiguous, all on one device. Several between the same two workers arrive in the order in which they are
    listed, so both must list the same sizes; empty ones do not travel.
    """
    operations = [dist.P2POp(dist.isend, tensor, worker) for worker, tensor in outgoing if len(tensor)]
    operations += [dist.P2POp(dist.irecv, tensor, worker) for worker, tensor in incoming if len(tensor)]
    with _peers():
        for operation in dist.batch_isend_irecv(operations) if operations else ():
            operation.wait()


def from_first(value: Value) -> Value:
    """The value of worker 0; it is pickled on the way."""
    return from_one(value, 0)


def from_one(value: Value, source: int) -> Value:
    """The value of the worker `source`; it is pickled on the way."""
    values = [value]
    if world_size() > 1:
        with _peers():
            dist.broadcast_object_list(values, src=source)
    return values[0]


def gather(value: Value) -> list[Value]:
    """The values of all workers in the order of their ranks; they are pickled on the way."""
    values = [value] * world_size()
    if world_size() > 1:
        with _peers():
            dist.all_gather_object(values, value)
    return values


def wait_for_all(seconds: float = 0.5) -> None:
    """Return once all workers are here, however long that takes: an exchange ends after PATIENCE.

    For a group that is ended as a whole if one of it dies, as Ray does: nobody notices it here. Looks every so many
    `seconds`. Raises PeerLost if the process that started the group is gone.
    """
    if world_size() == 1:
        return
    key = f"all-here-{next(_meetings)}"
    with _peers():
        store = dist.distributed_c10d._get_default_store()
        store.add(key, 1)
        while store.add(key, 0) < world_size():
            time.sleep(seconds)


def raise_together(problem: UserError | str | None) -> None:
    """Raise a UserError on all workers if one has a problem: alone, it would leave the others waiting.

    It is a TryAgain if that is one.
    """
    every = gather((str(problem), isinstance(problem, TryAgain)) if problem else None)
    if found := next((each for each in every if each), None):
        text, later = found
        raise (TryAgain if later else UserError)(text)


def share(count: int, worker: int, workers: int) -> range:
    """The part of `count` things that is a worker's; empty for some if there are more workers than things."""
    return range(worker * count // workers, (worker + 1) * count // workers)
