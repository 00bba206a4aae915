"""Distributed initialisation: each worker computes the factors for its share of the layers, in float32.

Shares are balanced by the method's cost, times E for a stack of experts. Then all workers exchange their factors, so
that all hold the same bytes; a digest over all factors confirms it. Computing the same layer on every worker would not
do, because the last bits of a QR depend on the number of threads.
"""

import hashlib
import heapq
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olora_ray.adapter.candidates import Target
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import method_named
from olora_ray.adapter.methods.method import DEFAULTS, Method, Options
from olora_ray.common import collectives
from olora_ray.common.errors import UserError

if TYPE_CHECKING:  # adapt() needs no pydantic
    from olora_ray.config.schema import Adapter

# Exchange of factors: each worker has computed the factors of its share; afterwards every worker holds all of them.


Shape = tuple[int, ...]


def exchange(
    own: Mapping[str, Factors],
    names: Iterable[str],
    shares: Sequence[Sequence[str]],
    seconds: float,
    device: torch.device,
) -> tuple[dict[str, Factors], "InitReport"]:
    """Return the factors of all layers `names`, the same bytes on every worker, and a report.

    `own` has the factors of this worker's share, which took it `seconds`; `shares` has the layer names of each worker's
    share. All workers must call it together; the numbers travel on `device`. Raises RuntimeError if the workers end
    with different bytes.
    """
    start = time.perf_counter()
    facts: dict[str, tuple[list[int], list[int] | None, bool]] = {}
    for name, item in own.items():
        shape_b0 = None if item.b0 is None else [*item.b0.shape]
        facts[name] = ([*item.a0.shape], shape_b0, item.full_rank)
    for told in collectives.gather(facts):
        facts |= told
    merged: dict[str, Factors] = {}
    hasher = hashlib.sha256()
    for worker, share in enumerate(shares):
        for name in share:
            if worker == collectives.rank():
                item = own[name]
            else:
                shape_a0, shape_b0, full_rank = facts[name]
                b0 = None if shape_b0 is None else torch.empty(shape_b0)
                item = Factors(torch.empty(shape_a0), b0, full_rank)
            a0 = _sent(item.a0, worker, device)
            hasher.update(a0.numpy().tobytes())
            b0 = None
            if item.b0 is not None:
                b0 = _sent(item.b0, worker, device)
                hasher.update(b0.numpy().tobytes())
            hasher.update(torch.tensor([float(item.full_rank)]).numpy().tobytes())
            merged[name] = Factors(a0, b0, item.full_rank)
    if len(set(collectives.gather(hasher.hexdigest()))) > 1:
        raise RuntimeError(
            "adapter factors differ between workers after their exchange: the network corrupted them"
        )
    factors = {name: merged[name] for name in names}
    report = InitReport(
        layers=tuple(map(len, shares)),
        seconds=tuple(collectives.gather(seconds)),
        exchange_seconds=time.perf_counter() - start,
        deficient=tuple(name for name, item in factors.items() if not item.full_rank),
        digest=hasher.hexdigest(),
    )
    return factors, report


def _sent(part: Tensor, worker: int, device: torch.device) -> Tensor:
    buffer = part.to(device).contiguous()
    if buffer.numel():  # a layer may have rank 0
        collectives.broadcast_in_place(buffer, worker)
    return buffer.cpu()


CHUNK = 2**26
"""Numbers of a stack that are converted to float32 at once (256 MiB), if one expert does not have more."""


@dataclass(frozen=True)
class InitReport:
    """A report of the initialisation, the same on every worker except for `exchange_seconds`."""

    layers: tuple[int, ...]
    seconds: tuple[float, ...]
    exchange_seconds: float
    deficient: tuple[str, ...]
    """Layers whose weight does not determine all factors, so that a part of them is arbitrary."""
    digest: str


def options_of(adapter: "Adapter") -> Options:
    return Options(**{field.name: getattr(adapter, field.name) for field in fields(Options)})


def check_rank(shapes: Mapping[str, Shape], method: str, rank: int) -> None:
    for name, (*_, m, n) in shapes.items():
        problem = method_named(method).problem(m, n, rank, name)
        if problem:
            raise UserError(problem)


def assign(
    shapes: Mapping[str, Shape], rank: int, workers: int, method: str = "olora"
) -> list[list[str]]:
    """Return the layer names for each worker: the costliest layer first, to the least loaded worker; deterministic."""
    cost_of = method_named(method).cost
    cost = {
        name: math.prod(experts) * cost_of(m, n, rank) for name, (*experts, m, n) in shapes.items()
    }
    load = [(0.0, worker) for worker in range(workers)]
    shares: list[list[str]] = [[] for _ in range(workers)]
    for name in sorted(shapes, key=lambda name: -cost[name]):
        total, worker = heapq.heappop(load)
        shares[worker].append(name)
        heapq.heappush(load, (total + cost[name], worker))
    return shares


def initialise(
    targets: Mapping[str, Target],
    method: str,
    rank: int,
    seed: int,
    device: torch.device,
    options: Options = DEFAULTS,
) -> tuple[dict[str, Factors], InitReport]:
    """Compute A~ and B~ of every target, for scale 1 (see `at_scale`).

    All workers of the process group call it together; without a group this process computes all layers. Raises
    UserError that names a layer in which the method cannot have this rank, or whose weight has NaN or infinite values.
    """
    shapes: dict[str, Shape] = {name: target.whole_shape for name, target in targets.items()}
    check_rank(shapes, method, rank)
    shares = assign(shapes, rank, collectives.world_size(), method)
    use = method_named(method)
    assert use.needs == "weight", f"{method} needs data: use train/data_driven.py"
    start = time.perf_counter()
    mine = shares[collectives.rank()]
    own = collectives.together(
        lambda: {
            name: _compute(name, targets[name], use, rank, seed, device, options) for name in mine
        }
    )
    seconds = time.perf_counter() - start
    return exchange(own, targets, shares, seconds, device)


def at_scale(factors: Mapping[str, Factors], adapter: "Adapter") -> dict[str, Factors]:
    use = method_named(adapter.method)
    options = options_of(adapter)
    return {name: use.at_scale(item, adapter.scale(), options) for name, item in factors.items()}


@torch.no_grad()
def _compute(
    name: str,
    target: Target,
    method: Method,
    rank: int,
    seed: int,
    device: torch.device,
    options: Options,
) -> Factors:
    # The seed depends on the layer's name and not on the worker, so that any number of workers gives the same factors.
    layer_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    parts = [
        method.factors(numbers, rank, layer_seed + first, options)
        for first, numbers in _numbers(target, device)
    ]
    b0 = [part.b0 for part in parts if part.b0 is not None]
    factors = Factors(
        torch.cat([part.a0 for part in parts]),
        torch.cat(b0) if b0 else None,
        all(part.full_rank for part in parts),
    )
    if not all(torch.isfinite(part).all() for part in (factors.a0, factors.b0) if part is not None):
        raise UserError(
            f"model.name: the weight of {name} has NaN or infinite values; use another copy of the model"
        )
    return factors


def _numbers(target: Target, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield the weight in float32, a stack in parts, each with its first expert."""
    # On the device first: the CPU would convert with one thread, and send twice as many bytes.
    if target.experts is None:
        yield 0, target.numbers().to(device).float()
        return
    size = max(1, CHUNK // math.prod(target.shape))
    for first in range(0, target.experts, size):
        yield first, target.numbers(first, first + size).to(device).float()


@torch.no_grad()
def weight_sizes(targets: Mapping[str, Target], device: torch.device) -> dict[str, Tensor]:
    """Return the root mean square singular value of each weight, and of each expert of a stack, with three digits.

    Each worker computes a share; all workers must call it together.
    """

    def share() -> dict[str, list[float]]:
        sizes = {}
        for name in list(targets)[collectives.rank() :: collectives.world_size()]:
            target = targets[name]
            parts = [
                numbers.norm(dim=(-2, -1)).reshape(-1) for _, numbers in _numbers(target, device)
            ]
            norms = torch.cat(parts) / min(target.shape) ** 0.5
            # The last bits of a norm depend on the number of threads.
            sizes[name] = [float(f"{norm:.3g}") for norm in norms.tolist()]
        return sizes

    found: dict[str, list[float]] = {}
    for told in collectives.gather(collectives.together(share)):
        found |= told
    return {name: torch.tensor(found[name]) for name in targets}
