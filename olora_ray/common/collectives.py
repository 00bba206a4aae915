"""Exchanges between the workers of a training: the only file that calls the collectives of torch.distributed.

Every function must be called by all workers, in the same order. In a process without a process group, or alone in
one, they return at once: one process is a group of one.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from olora_ray.common.errors import UserError

Value = TypeVar("Value")


def rank() -> int:
    """Number of this worker; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_in_place(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all workers."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def broadcast_in_place(tensor: Tensor, source: int) -> None:
    """Replace a tensor by that of the worker `source`."""
    if world_size() > 1:
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
    for operation in dist.batch_isend_irecv(operations) if operations else ():
        operation.wait()


def from_first(value: Value) -> Value:
    """The value of worker 0; it is pickled on the way."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Value) -> list[Value]:
    """The values of all workers in the order of their ranks; they are pickled on the way."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def raise_together(problem: str | None) -> None:
    """Raise a UserError on all workers if one has a problem: alone, it would leave the others waiting."""
    if found := next((each for each in gather(problem) if each), None):
        raise UserError(found)
