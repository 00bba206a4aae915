"""Exchange of factors: each worker has computed those of its share; afterwards all hold all of them.

One flat buffer per worker, one broadcast each, instead of two tensors per layer. Every layer has a rank of its own: the
shapes go ahead of the numbers. A layer may have rank 0: then nothing adapts it (adapter/inject.py).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from olora_ray.adapter.factors import Factors
from olora_ray.common import collectives

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape | None]
"""Of a layer's A0 and B0."""


def exchange(
    own: Mapping[str, Factors], shares: Sequence[Sequence[str]], device: torch.device
) -> tuple[dict[str, Factors], str]:
    """The factors of all layers, the same bytes on every worker, and the SHA-256 over them.

    `own` are those of this worker's share, `shares` the names of each worker's; the numbers travel by `device`. Raises
    RuntimeError if the workers do not end with the same bytes.
    """
    here = collectives.rank()
    shapes: dict[str, Shapes] = {}
    for part in collectives.gather({name: _shapes(item) for name, item in own.items()}):
        shapes |= part
    merged: dict[str, Factors] = {}
    hasher = hashlib.sha256()
    for worker, share in enumerate(shares):
        buffer = _pack(own, share) if worker == here else torch.empty(sum(_size(shapes[name]) for name in share))
        buffer = buffer.to(device)
        collectives.broadcast_in_place(buffer, worker)
        buffer = buffer.cpu()
        hasher.update(buffer.numpy().tobytes())
        merged.update(_unpack(buffer, share, shapes))
    if len(set(collectives.gather(hasher.digest()))) > 1:
        raise RuntimeError("workers hold different factors after the exchange: the network corrupted a broadcast")
    return merged, hasher.hexdigest()


def _shapes(item: Factors) -> Shapes:
    return tuple(item.a0.shape), None if item.b0 is None else tuple(item.b0.shape)


def _size(shapes: Shapes) -> int:
    a0, b0 = shapes
    return math.prod(a0) + (0 if b0 is None else math.prod(b0)) + 1


def _pack(own: Mapping[str, Factors], share: Sequence[str]) -> Tensor:
    parts = [torch.empty(0)]
    for name in share:
        item = own[name]
        parts.append(item.a0.reshape(-1).cpu())
        if item.b0 is not None:
            parts.append(item.b0.reshape(-1).cpu())
        parts.append(torch.tensor([float(item.full_rank)]))
    return torch.cat(parts)


def _unpack(buffer: Tensor, share: Sequence[str], shapes: Mapping[str, Shapes]) -> dict[str, Factors]:
    result, place = {}, 0

    def take(shape: Shape) -> Tensor:
        nonlocal place
        size = math.prod(shape)
        part = buffer[place : place + size].view(shape)
        place += size
        return part

    for name in share:
        of_a0, of_b0 = shapes[name]
        a0 = take(of_a0)
        b0 = None if of_b0 is None else take(of_b0)
        result[name] = Factors(a0, b0, full_rank=bool(take((1,)).item()))
    return result
