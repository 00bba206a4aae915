"""LoRA-GA's factors (adapter/methods/lora_ga.py), by all workers together, of the run's first supervised tokens."""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from olora_ray.adapter.exchange import exchange
from olora_ray.adapter.factors import Factors
from olora_ray.adapter.initialise import InitReport, options_of
from olora_ray.adapter.methods import METHODS
from olora_ray.adapter.targets import Target
from olora_ray.common import collectives
from olora_ray.config.adapter import Adapter
from olora_ray.tokens.store import TokenStore
from olora_ray.train.data_driven import DataReport, owners_of, pieces_of, probe, refuse
from olora_ray.train.gradients import Gradients
from olora_ray.train.layer_inputs import LayerInput, inputs_of
from olora_ray.train.loader import Waiting
from olora_ray.train.loss import SupervisedLoss

AT_ONCE = 2**30
"""Bytes of gradients that a worker holds at once, about; for more the model is run again for the next layers."""


def gradient_factors(
    loss: SupervisedLoss,
    targets: Mapping[str, Target],
    adapter: Adapter,
    store: TokenStore,
    device: torch.device,
    waiting: Waiting | None = None,
) -> tuple[dict[str, Factors], InitReport, DataReport]:
    """A0 and B0 of every target; see `data_driven.eva_factors` for arguments and errors."""
    refuse(targets, adapter.method)
    began = time.perf_counter()
    pieces = pieces_of(store, adapter, 0, waiting)
    inputs = inputs_of(loss, targets, probe(loss, store[0]).to(device))
    own: dict[str, Factors] = {}
    shares: list[list[str]] = [[] for _ in range(collectives.world_size())]
    held = sent = 0
    for part in _parts(inputs, targets):
        owners = owners_of(part, targets, adapter)
        found = Gradients(loss, targets, part, owners, store, device)
        found.spread.run(pieces)
        held, sent = max(held, found.held()), sent + found.spread.sent
        own |= _factors(found, adapter)
        for each, owner in zip(part, owners, strict=True):
            shares[owner].extend(each.layers)
    seconds = time.perf_counter() - began

    began = time.perf_counter()
    merged, digest = exchange(own, shares, device)
    every = {name: merged[name] for name in targets}
    report = InitReport(
        layers=tuple(map(len, shares)),
        seconds=tuple(collectives.gather(seconds)),
        exchange_seconds=time.perf_counter() - began,
        deficient=tuple(name for name, item in every.items() if not item.full_rank),
        digest=digest,
    )
    most, total = zip(*collectives.gather((held, sent)), strict=True)
    ranks = dict.fromkeys(targets, adapter.rank)
    return every, report, DataReport(pieces[-1].end, len(pieces), None, max(most), sum(total), ranks, "gradients")


def _parts(inputs: Sequence[LayerInput], targets: Mapping[str, Target]) -> Iterator[list[LayerInput]]:
    """The inputs in parts whose layers' gradients have room on all workers together, or one input."""
    part: list[LayerInput] = []
    size, room = 0, AT_ONCE * collectives.world_size()
    for each in inputs:
        needed = sum(4 * targets[name].shape[0] * each.size for name in each.layers)
        if part and size + needed > room:
            yield part
            part, size = [], 0
        part.append(each)
        size += needed
    yield part


def _factors(found: Gradients, adapter: Adapter) -> dict[str, Factors]:
    make, options = METHODS[adapter.method].factors, options_of(adapter)
    made = {name: make(gradient, adapter.rank, 0, options) for name, gradient in found.sums.items()}
    return {
        name: Factors(item.a0.cpu(), None if item.b0 is None else item.b0.cpu(), item.full_rank)
        for name, item in made.items()
    }
