"""Distributed initialisation: each worker computes the factors of its share of the layers, in float32.

Shares are balanced by the method's cost (E times that for a stack of experts), and exchanged among all.
Afterwards all workers hold the same bytes, which a digest over everything confirms (a QR's last bits depend on the
number of threads, so computing the same layer everywhere would not do).
"""

import hashlib
import heapq
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olora_ray.adapter.candidates import Target
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import METHODS, Method, Options
from olora_ray.adapter.methods.method import DEFAULTS
from olora_ray.common import collectives, node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter

# Exchange of factors: each worker has computed those of its share; afterwards all hold all of them.


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


CHUNK = 2**26
"""Numbers of a stack that are taken to float32 at once: 256 MiB, or one expert."""


@dataclass(frozen=True)
class InitReport:
    """What the initialisation did, the same on every worker but for `exchange_seconds`."""

    layers: tuple[int, ...]
    """Layers computed by each worker."""
    seconds: tuple[float, ...]
    """Time of each worker's share."""
    exchange_seconds: float
    deficient: tuple[str, ...]
    """Layers of which a part of the factors is arbitrary, since the weight does not decide it."""
    digest: str
    """SHA-256 over all factors."""


def options_of(adapter: Adapter) -> Options:
    """The settings of methods in a config."""
    return Options(**{field.name: getattr(adapter, field.name) for field in fields(Options)})


def check(shapes: Mapping[str, Shape], method: str, rank: int) -> None:
    """Raise UserError that names the first layer in which the method cannot have this rank."""
    for name, (*_, m, n) in shapes.items():
        if problem := METHODS[method].problem(m, n, rank, name):
            raise UserError(problem)


def assign(shapes: Mapping[str, Shape], rank: int, workers: int, method: str = "olora") -> list[list[str]]:
    """Names for each worker: the costliest layer first, to the least loaded worker; deterministic."""
    each = METHODS[method].cost
    cost = {name: math.prod(experts) * each(m, n, rank) for name, (*experts, m, n) in shapes.items()}
    load = [(0.0, worker) for worker in range(workers)]
    shares: list[list[str]] = [[] for _ in range(workers)]
    for name in sorted(shapes, key=lambda name: -cost[name]):
        total, worker = heapq.heappop(load)
        shares[worker].append(name)
        heapq.heappush(load, (total + cost[name], worker))
    return shares


def initialise(
    targets: Mapping[str, Target], method: str, rank: int, seed: int, device: torch.device, options: Options = DEFAULTS
) -> tuple[dict[str, Factors], InitReport]:
    """A~ and B~ of every target (for scale 1, see `at_scale`), computed by all workers of the process group together.

    Without a process group this process computes them all. Raises UserError that names a layer in which the method
    cannot have this rank, or whose weight has NaN or infinite values.
    """
    shapes: dict[str, Shape] = {name: target.whole_shape for name, target in targets.items()}
    check(shapes, method, rank)
    shares = assign(shapes, rank, collectives.world_size(), method)
    use = METHODS[method]
    assert use.needs == "weight", f"{method} is made of data: train/data_driven.py"
    start = time.perf_counter()
    own, problem, here = {}, None, collectives.rank()
    try:
        own = {name: _compute(name, targets[name], use, rank, seed, device, options) for name in shares[here]}
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)
    seconds = time.perf_counter() - start

    start = time.perf_counter()
    merged, digest = exchange(own, shares, device)
    found = {name: merged[name] for name in targets}
    report = InitReport(
        layers=tuple(len(share) for share in shares),
        seconds=tuple(collectives.gather(seconds)),
        exchange_seconds=time.perf_counter() - start,
        deficient=tuple(name for name, item in found.items() if not item.full_rank),
        digest=digest,
    )
    return found, report


def at_scale(found: Mapping[str, Factors], adapter: Adapter) -> dict[str, Factors]:
    """A0 and B0 of an adapter with these settings, from its A~ and B~."""
    use, options = METHODS[adapter.method], options_of(adapter)
    return {name: use.at_scale(item, adapter.scale(), options) for name, item in found.items()}


@torch.no_grad()
def _compute(
    name: str, target: Target, method: Method, rank: int, seed: int, device: torch.device, options: Options
) -> Factors:
    # A seed of its own for each layer, so that it does not matter who computes it.
    layer_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    if target.experts is None:
        found = method.factors(target.numbers().to(device, torch.float32), rank, layer_seed, options)
    else:
        size = max(1, CHUNK // math.prod(target.shape))
        found = _together(
            [
                method.factors(
                    target.numbers(first, first + size).to(device, torch.float32), rank, layer_seed + first, options
                )
                for first in range(0, target.experts, size)
            ]
        )
    if not all(torch.isfinite(part).all() for part in (found.a0, found.b0) if part is not None):
        raise UserError(f"model.name: the weight of {name} has NaN or infinite values")
    return found


def _together(chunks: list[Factors]) -> Factors:
    b0 = [chunk.b0 for chunk in chunks if chunk.b0 is not None]
    return Factors(
        torch.cat([chunk.a0 for chunk in chunks]), torch.cat(b0) if b0 else None, all(c.full_rank for c in chunks)
    )


# Cache of factors: computed once for a search, and read by its trials.


TENSORS, DESCRIPTION = "factors.safetensors", "factors.json"


def write(
    place: str, factors: Mapping[str, Factors], origin: Mapping[str, str], rank: int, prefix: bool = True
) -> None:
    """Keep factors in the folder `place`; `origin` says what they were computed from, `prefix` is the method's."""
    parts: dict[str, Tensor] = {}
    for name, found in factors.items():
        parts[f"{name}.a0"] = found.a0
        if found.b0 is not None:
            parts[f"{name}.b0"] = found.b0
    with tempfile.TemporaryDirectory(prefix="olora-factors-") as folder:
        save_file({name: part.contiguous().cpu() for name, part in parts.items()}, Path(folder) / TENSORS)
        storage.write_bytes(storage.join(place, TENSORS), (Path(folder) / TENSORS).read_bytes())
    # A prefix of a completed slice need not be what the smaller slice is completed to.
    whole = all(found.full_rank for found in factors.values())
    described = {**origin, "rank": rank, "full_rank": whole, "prefix": prefix}
    storage.write_text(storage.join(place, DESCRIPTION), json.dumps(described))


def has(place: str, origin: Mapping[str, str], rank: int) -> bool:
    """Whether factors of this origin are kept there from which those of this rank follow."""
    return _description(place, origin, rank) is not None


def _description(place: str, origin: Mapping[str, str], rank: int) -> dict[str, Any] | None:
    """What is said of the factors there, if those of this origin and rank follow from them."""
    try:
        found = json.loads(storage.read_text(storage.join(place, DESCRIPTION)))
        # Without a prefix, layers may have ranks of their own.
        enough = found["rank"] >= rank if found["prefix"] else found["rank"] == rank
        return found if found["full_rank"] and enough and {**found, **origin} == found else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read(place: str, origin: Mapping[str, str], rank: int, names: list[str]) -> dict[str, Factors] | None:
    """The factors of these layers at `rank`; None if they are not there, of another origin, or too small."""
    description = _description(place, origin, rank)
    if description is None:
        return None
    limit = rank if description["prefix"] else None
    try:
        with (
            node_cache.fetched(storage.join(place, TENSORS)) as local,
            safe_open(local, "pt") as file,
        ):
            there = set(file.keys())
            return {
                name: Factors(
                    _first(file.get_slice(f"{name}.a0"), -2, limit),
                    _first(file.get_slice(f"{name}.b0"), -1, limit) if f"{name}.b0" in there else None,
                )
                for name in names
            }
    except (OSError, SafetensorError):
        return None


def _first(stored: Any, dim: int, rank: int | None) -> Tensor:
    """The first `rank` (None: all) of a stored tensor's dimension `dim`; nothing else of it is read."""
    places = [slice(None)] * len(stored.get_shape())
    places[dim] = slice(rank)
    part: Tensor = stored[tuple(places)]
    return part.contiguous()
