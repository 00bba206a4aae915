"""Factors from the training data, made by all workers together: EVA's (adapter/methods/eva.py).

EVA looks at the first T supervised tokens of the store, for T = L / 4, L / 2 and L, where L is adapter.init_tokens, or
all tokens if there are fewer. It stops as soon as the spaces of two successive T agree, or at L. The number of workers
changes the time only: the bytes of the factors are the same for any number.
"""

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from olora_ray.adapter.candidates import Target, candidates, parameter_of
from olora_ray.adapter.initialise import (
    InitReport,
    assign,
    exchange,
    initialise,
    options_of,
    weight_sizes,
)
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import method_named
from olora_ray.adapter.methods.eva import Components, principal
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural, some
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.schema import Adapter
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train.layer_inputs import (
    Activations,
    LayerInput,
    RowPart,
    first_tokens,
    inputs_of,
)
from olora_ray.train.loss import SupervisedLoss

Value = TypeVar("Value")
AGREEMENT = 0.99
"""Share of an input's space from which on more tokens are taken to give the same space."""


@dataclass(frozen=True)
class DataReport:
    tokens: int
    sequences: int
    agreement: tuple[float, float] | None
    """Mean and smallest share of the space that half as many tokens give too; None if there were too few tokens."""
    held: int
    """Bytes held by the worker with the most."""
    sent: int
    """Bytes sent between workers, over all of them."""
    ranks: Mapping[str, int]

    def line(self, method: str) -> str:
        line = f"{method}: {plural(self.tokens, 'supervised token')} of {plural(self.sequences, 'sequence')}"
        if self.agreement:
            mean, least = self.agreement
            line += f"; half of the tokens give {mean:.0%} of the same directions (at least {least:.0%} in each layer)"
        low = min(self.ranks.values())
        high = max(self.ranks.values())
        if low < high:
            line += f"; ranks {low} to {high}"
        without = [name for name, rank in self.ranks.items() if rank == 0]
        if without:
            line += f", none for {some(without)}"
        return f"{line}; activations {self.held / 2**20:,.1f} MiB per worker, {self.sent / 2**20:,.1f} MiB sent"


def refuse(targets: Mapping[str, Target], method: str) -> None:
    """Raise UserError for experts whose weights are one parameter, which data-driven methods do not support."""
    for name, target in targets.items():
        if target.experts is not None:
            raise UserError(
                f"adapter.method={method}: {name} is a stack of experts, which this method does not support; leave it"
                " out of adapter.targets, or use another method"
            )


def _pieces(store: TokenStore, adapter: Adapter, count: int) -> list[RowPart]:
    def read() -> list[RowPart]:
        pieces = first_tokens(store, adapter.init_tokens)
        # `count` components and the mean need more than `count` tokens.
        total = pieces[-1].end if pieces else 0
        if total <= count:
            raise UserError(
                f"adapter.method={adapter.method}: the training data has {plural(total, 'supervised token')}, but"
                f" {count} components (rho x rank) need more than {count}; use more data, lower adapter.rank or"
                " adapter.rho, or use another method"
            )
        return pieces

    return collectives.together(read)


def probe(loss: SupervisedLoss, pack: Pack) -> Batch:
    length = min(8, pack.segments[0])  # a few tokens are enough to see which layers share an input
    start = Pack(pack.input_ids[:length], np.arange(length) > 0, (length,))
    model: Any = loss.model
    return collate([start], model.config._attn_implementation)


def _owners(
    inputs: Sequence[LayerInput], targets: Mapping[str, Target], adapter: Adapter
) -> list[int]:
    shapes = {}
    for each in inputs:
        rows = sum(targets[name].shape[0] for name in each.layers)
        shapes[each.name] = (rows, each.size)
    owner: dict[str, int] = {}
    shares = assign(shapes, adapter.rank, collectives.world_size(), adapter.method)
    for worker, share in enumerate(shares):
        owner |= dict.fromkeys(share, worker)
    return [owner[each.name] for each in inputs]


# EVA's factors: from the activations of each input, on the worker that owns the input.


def eva_factors(
    loss: SupervisedLoss,
    targets: Mapping[str, Target],
    adapter: Adapter,
    store: TokenStore,
    device: torch.device,
) -> tuple[dict[str, Factors], InitReport, DataReport]:
    """Return A0 of every target, with ranks redistributed; a layer may get rank 0.

    All workers must call it together. `loss` is the base on `device`, without adapters, with the attention of the
    training. Raises UserError for too few supervised tokens, for layers that do not see every token, and for
    activations that are not finite.
    """
    refuse(targets, adapter.method)
    began = time.perf_counter()
    count = adapter.largest_rank()
    pieces = _pieces(store, adapter, count)
    inputs = inputs_of(loss, targets, probe(loss, store[0]).to(device))
    owners = _owners(inputs, targets, adapter)
    activations = Activations(loss, targets, inputs, owners, store, device)
    own, tokens, agreement = _until_stable(activations, pieces, count, adapter.rank)
    seconds = time.perf_counter() - began

    # The ranks of all layers sum up to targets x adapter.rank, unless the inputs vary in fewer directions.
    shares_of = _gathered({number: item.shares for number, item in own.items()})
    of_layer: dict[str, tuple[float, ...]] = {}
    for number, each in enumerate(inputs):
        of_layer |= dict.fromkeys(each.layers, shares_of[number])
    offers = {name: of_layer[name][: min(count, *target.shape)] for name, target in targets.items()}
    ranks = redistributed(offers, len(targets) * adapter.rank)

    made = {}
    for number, item in own.items():
        for name in inputs[number].layers:
            vectors = item.vectors[: ranks[name]]
            made[name] = Factors(vectors.to("cpu", torch.float32), None)
    shares: list[list[str]] = [[] for _ in range(collectives.world_size())]
    for each, owner in zip(inputs, owners, strict=True):
        shares[owner].extend(each.layers)
    every, report = exchange(made, targets, shares, seconds, device)
    used = [piece for piece in pieces if piece.first < tokens]
    held, sent = zip(*collectives.gather((activations.held(), activations.sent)), strict=True)
    data_report = DataReport(tokens, len(used), agreement, max(held), sum(sent), ranks)
    return every, report, data_report


def _until_stable(
    acts: Activations, pieces: Sequence[RowPart], count: int, rank: int
) -> tuple[dict[int, Components], int, tuple[float, float] | None]:
    """Return the components of the own inputs, the number of tokens used, and the agreement with half as many."""
    total = pieces[-1].end
    # L / 4, L / 2 and L, rounded down, without stages that have too few tokens for `count` components.
    stages = [tokens for tokens in (total // 4, total // 2, total) if tokens > count]
    before: dict[int, Components] | None = None
    agreement = None
    done = 0
    for tokens in stages:
        needed = [piece for piece in pieces if piece.first < tokens]
        acts.run(needed[done:])
        done = len(needed)
        now = {
            number: principal(acts.rows(number, tokens).to(acts.device), count)
            for number in acts.own
        }
        if before is not None:
            every = _gathered(
                {number: overlap(now[number], before[number], rank) for number in now}
            )
            # Summed in the order of the inputs, so that every worker gets the same bits and stops at the same stage.
            values = [every[number] for number in sorted(every)]
            agreement = sum(values) / len(values), min(values)
            if agreement[1] >= AGREEMENT:
                return now, tokens, agreement
        before = now
    return before or {}, stages[-1], agreement


def redistributed(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Return the number of components that each layer keeps: those of the `budget` largest of all shares.

    `shares` has each layer's shares, falling, in the order of the layers. Among equal shares the earlier component
    comes first, then the earlier layer.
    """
    offers = []
    for layer_index, (name, layer) in enumerate(shares.items()):
        for index, share in enumerate(layer):
            offers.append((-share, index, layer_index, name))
    kept = dict.fromkeys(shares, 0)
    for *_, name in sorted(offers)[:budget]:
        kept[name] += 1
    return kept


def overlap(now: Components, before: Components, rank: int) -> float:
    """Return the part, 0 to 1, of the space of the first `rank` components of `now` that those of `before` span."""
    new = now.vectors[:rank]
    old = before.vectors[:rank]
    return float((new @ old.mT).square().sum()) / max(1, len(new))


def _gathered(own: Mapping[int, Value]) -> dict[int, Value]:
    return dict(itertools.chain.from_iterable(collectives.gather(list(own.items()))))


# New factors for a training: from the weights or from the training data, as the method needs.


def new_factors(
    loss: SupervisedLoss,
    targets: Mapping[str, Target],
    config: DecidedConfig,
    store: TokenStore,
    device: torch.device,
) -> tuple[dict[str, Factors], InitReport, DataReport | None]:
    """Return A~ and B~ of every target; all workers must call it together.

    See `initialise` and `eva_factors`. For a data-driven method, the base must be on the device where it will be
    trained, must have passed its self-test, and must have no adapters yet.
    """
    adapter = config.adapter
    if method_named(adapter.method).needs != "weight":
        return eva_factors(loss, targets, adapter, store, device)
    seed = config.run.seed
    options = options_of(adapter)
    return *initialise(
        _whole(loss, targets), adapter.method, adapter.rank, seed, device, options
    ), None


def sizes_of(loss: SupervisedLoss, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """Return `weight_sizes` of these weights; all workers must call it together, before the model has adapters."""
    known = candidates(loss.model)
    return weight_sizes(_whole(loss, {name: known[name].target for name in names}), device)


def _whole(loss: SupervisedLoss, targets: Mapping[str, Target]) -> dict[str, Target]:
    read = loss.read_rows
    if read is None:
        return dict(targets)
    # No worker holds all rows of a sharded layer, so the worker that computes with it reads the layer's files.
    names = {name: parameter_of(loss.model, name) for name in targets}
    return {name: replace(each, read=partial(read, names[name])) for name, each in targets.items()}
