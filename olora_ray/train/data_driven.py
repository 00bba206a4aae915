"""Factors that are made of the training data: EVA's (adapter/methods/eva.py), by all workers together.

Looked at are the first T supervised tokens of the run's order, T = L / 4, L / 2 and L for the limit L =
adapter.init_tokens (or all there are): as soon as two successive T agree in the space that they find, or at L, it is
done. Which worker computes what decides nothing but the time: the same bytes come of any number of workers.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from olora_ray.adapter.exchange import exchange
from olora_ray.adapter.factors import Factors
from olora_ray.adapter.initialise import InitReport, assign
from olora_ray.adapter.methods import eva
from olora_ray.adapter.methods.eva import Components
from olora_ray.adapter.targets import Target
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.schema import Adapter
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train.activations import Activations
from olora_ray.train.first_tokens import Piece, first_tokens
from olora_ray.train.layer_inputs import LayerInput, inputs_of
from olora_ray.train.loader import Waiting
from olora_ray.train.loss import SupervisedLoss

AGREEMENT = 0.99
"""The share of each input's space at which more tokens would find the same."""
PROBE = 8
"""Tokens on which the model is run to see which layers have an input in common."""


@dataclass(frozen=True)
class DataReport:
    """What a data-driven initialisation did, beside `InitReport`; the same on every worker."""

    tokens: int
    """Supervised tokens that were looked at."""
    sequences: int
    agreement: tuple[float, float] | None
    """Mean and smallest share of the space that half as many tokens find too; None if there were too few to tell."""
    held: int
    """Bytes of activations, on the worker with the most."""
    sent: int
    """Bytes between workers, over all of them."""
    ranks: Mapping[str, int]
    what: str = "activations"
    """What is held."""

    def line(self, method: str) -> str:
        """For the log."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        without = [name for name, rank in self.ranks.items() if rank == 0]
        agree = self.agreement and f"; half of them span {self.agreement[0]:.0%} of its space ({self.agreement[1]:.0%}"
        return (
            f"{method}: {plural(self.tokens, 'supervised token')} of {plural(self.sequences, 'sequence')}"
            + (f"{agree} at least)" if agree else "")
            + (f"; ranks {low} to {high}" if low < high else "")
            + (f", none for {', '.join(without[:3])}{' ...' * (len(without) > 3)}" if without else "")
            + f"; {self.what} {self.held / 2**20:,.1f} MiB a worker, {self.sent / 2**20:,.1f} MiB sent"
        )


def refuse(targets: Mapping[str, Target], method: str) -> None:
    """Raise UserError for layers that a data-driven method cannot have: experts whose weights are one parameter."""
    for name, target in targets.items():
        if target.experts is not None:
            raise UserError(
                f"adapter.method={method}: {name} is a stack of experts, each of which sees other tokens; name layers"
                " without it in adapter.targets, or use another method"
            )


def eva_factors(
    loss: SupervisedLoss,
    targets: Mapping[str, Target],
    adapter: Adapter,
    store: TokenStore,
    device: torch.device,
    waiting: Waiting | None = None,
) -> tuple[dict[str, Factors], InitReport, DataReport]:
    """A0 of every target, with ranks redistributed: a layer may get 0. All workers must call it together.

    `loss` is the base, in place on `device` and untouched by adapters, with the attention that it will be trained with.
    `waiting` as of StepLoader. Raises UserError for too few supervised tokens, for layers that do not see every token,
    and for activations that are not finite.
    """
    refuse(targets, adapter.method)
    began, count = time.perf_counter(), adapter.largest_rank()
    pieces = pieces_of(store, adapter, count, waiting)
    inputs = inputs_of(loss, targets, probe(loss, store[0]).to(device))
    owners = owners_of(inputs, targets, adapter)
    found = Activations(loss, targets, inputs, owners, store, device)
    own, tokens, agreement = _until_stable(found, pieces, _stages(pieces[-1].end, count), count, adapter.rank)
    seconds = time.perf_counter() - began

    began = time.perf_counter()
    ranks = _ranks(targets, inputs, own, adapter, count)
    shares: list[list[str]] = [[] for _ in range(collectives.world_size())]
    for each, owner in zip(inputs, owners, strict=True):
        shares[owner].extend(each.layers)
    merged, digest = exchange(_factors(inputs, own, ranks), shares, device)
    report = InitReport(
        tuple(map(len, shares)), tuple(collectives.gather(seconds)), time.perf_counter() - began, (), digest
    )
    used = [piece for piece in pieces if piece.first < tokens]
    held, sent = zip(*collectives.gather((found.held(), found.spread.sent)), strict=True)
    about = DataReport(tokens, len(used), agreement, max(held), sum(sent), ranks)
    return {name: merged[name] for name in targets}, report, about


def pieces_of(store: TokenStore, adapter: Adapter, count: int, waiting: Waiting | None) -> list[Piece]:
    """What is looked at; raises UserError if it is not more tokens than these components (the mean takes one)."""
    problem, pieces = None, []
    try:
        pieces = first_tokens(store, adapter.init_tokens, waiting)
        problem = _too_few(pieces[-1].end if pieces else 0, count, adapter)
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)
    return pieces


def _too_few(total: int, count: int, adapter: Adapter) -> str | None:
    if total > count:
        return None
    return (
        f"adapter.method={adapter.method}: the training data has {plural(total, 'supervised token')}, and {count}"
        f" components (rho x rank) need more than {count}; use more data, lower adapter.rank or adapter.rho, or use"
        " another method"
    )


def probe(loss: SupervisedLoss, pack: Pack) -> Batch:
    """A few tokens to see with which layers have an input in common."""
    length = min(PROBE, pack.segments[0])
    start = Pack(pack.input_ids[:length], np.arange(length) > 0, (length,))
    model: Any = loss.model
    return collate([start], str(model.config._attn_implementation))


def owners_of(inputs: Sequence[LayerInput], targets: Mapping[str, Target], adapter: Adapter) -> list[int]:
    """The worker of each input, so that all have about as much to do."""
    shapes = {each.name: (sum(targets[name].shape[0] for name in each.layers), each.size) for each in inputs}
    shares = assign(shapes, adapter.rank, collectives.world_size(), adapter.method)
    owner = {name: worker for worker, share in enumerate(shares) for name in share}
    return [owner[each.name] for each in inputs]


def _stages(total: int, count: int) -> list[int]:
    """L / 4, L / 2 and L, rounded down, without those that have too few tokens for so many components."""
    return [tokens for tokens in (total // 4, total // 2, total) if tokens > count]


def _until_stable(
    found: Activations, pieces: Sequence[Piece], stages: Sequence[int], count: int, rank: int
) -> tuple[dict[int, Components], int, tuple[float, float] | None]:
    """Components of the own inputs, the tokens they are of, and how far those of half as many agree."""
    before: dict[int, Components] | None = None
    agreement, done = None, 0
    for tokens in stages:
        needed = [piece for piece in pieces if piece.first < tokens]
        found.spread.run(needed[done:])
        done = len(needed)
        now = {
            number: eva.principal(found.rows(number, tokens).to(found.device), count) for number in found.spread.own()
        }
        if before is not None:
            agreement = _agreement({number: eva.overlap(now[number], before[number], rank) for number in now})
            if agreement[1] >= AGREEMENT:
                return now, tokens, agreement
        before = now
    return before or {}, stages[-1], agreement


def _agreement(own: Mapping[int, float]) -> tuple[float, float]:
    """Mean and smallest of all inputs', in their order, so that the sum has the same bits everywhere."""
    every = dict(pair for part in collectives.gather(list(own.items())) for pair in part)
    values = [every[number] for number in sorted(every)]
    return sum(values) / len(values), min(values)


def _ranks(
    targets: Mapping[str, Target],
    inputs: Sequence[LayerInput],
    own: Mapping[int, Components],
    adapter: Adapter,
    count: int,
) -> dict[str, int]:
    """Each layer's rank; they sum up to what the same rank for all would, unless inputs vary in fewer directions."""
    every = dict(pair for part in collectives.gather([(i, item.shares) for i, item in own.items()]) for pair in part)
    of_layer = {name: every[number] for number, each in enumerate(inputs) for name in each.layers}
    offers = {name: of_layer[name][: min(count, *target.shape)] for name, target in targets.items()}
    return eva.ranks(offers, len(targets) * adapter.rank)


def _factors(
    inputs: Sequence[LayerInput], own: Mapping[int, Components], ranks: Mapping[str, int]
) -> dict[str, Factors]:
    return {
        name: Factors(item.vectors[: ranks[name]].to("cpu", torch.float32), None)
        for number, item in own.items()
        for name in inputs[number].layers
    }
