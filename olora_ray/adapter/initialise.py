"""Distributed initialisation: each worker computes the factors of its share of the layers, in float32.

Shares are balanced by the method's cost (E times that for a stack of experts), and exchanged (adapter/exchange.py).
Afterwards all workers hold the same bytes, which a digest over everything confirms (a QR's last bits depend on the
number of threads, so computing the same layer everywhere would not do).
"""

import hashlib
import heapq
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from olora_ray.adapter.exchange import Shape, exchange
from olora_ray.adapter.factors import Factors
from olora_ray.adapter.methods import METHODS, Method, Options
from olora_ray.adapter.methods.method import DEFAULTS
from olora_ray.adapter.targets import Target
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter

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
    assert use.needs == "weight", f"{method} is made of data: train/new_factors.py"
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
