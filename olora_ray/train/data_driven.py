"""Factors that are made of the training data: EVA's (adapter/methods/eva.py), by all workers together.

Looked at are the first T supervised tokens of the run's order, T = L / 4, L / 2 and L for the limit L =
adapter.init_tokens (or all there are): as soon as two successive T agree in the space that they find, or at L, it is
done. Which worker computes what decides nothing but the time: the same bytes come of any number of workers.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olora_ray.adapter.candidates import Target, parameter_of
from olora_ray.adapter.initialise import InitReport, assign, exchange, initialise, options_of
from olora_ray.adapter.layer import Factors
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS, eva
from olora_ray.adapter.methods.eva import Components
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.schema import Adapter, Config
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train.calibration import LayerInput, Piece, Rows, Spread, first_tokens, inputs_of, rows_of
from olora_ray.train.loader import Waiting
from olora_ray.train.loss import SupervisedLoss

# Activations of a whole training at its first supervised tokens, each input's on the worker that owns it.


class Activations:
    """The rows of the inputs that this worker owns, in the order of the tokens."""

    def __init__(
        self,
        loss: SupervisedLoss,
        targets: Mapping[str, Target],
        inputs: Sequence[LayerInput],
        owners: Sequence[int],
        store: TokenStore,
        device: torch.device,
    ) -> None:
        """`owners` has the worker of each input."""
        self.loss, self.targets, self.inputs = loss, targets, inputs
        self.store, self.device = store, device
        kinds = [Rows(each.size, each.dtype, owner) for each, owner in zip(inputs, owners, strict=True)]
        self.spread = Spread(kinds, self._forward, lambda piece: piece.count, self._keep, device)
        self._rows: dict[int, dict[int, Tensor]] = {number: {} for number in self.spread.own()}

    def rows(self, number: int, count: int) -> Tensor:
        """The first `count` rows of an own input (count x n), as the model has computed them."""
        pieces = self._rows[number]
        return torch.cat([pieces[first] for first in sorted(pieces)])[:count]

    def held(self) -> int:
        """Bytes of all rows that lie here."""
        return sum(part.nbytes for pieces in self._rows.values() for part in pieces.values())

    def _forward(self, piece: Piece) -> list[Tensor]:
        attention = self.loss.model.config._attn_implementation  # type: ignore[union-attr]
        batch = collate([self.store[piece.sequence]], str(attention))
        # The tokens that are supervised themselves, as PEFT's label mask has it, not those that predict them.
        places = batch.predicts[: piece.count] + 1
        return rows_of(self.loss, self.targets, self.inputs, batch.to(self.device), places.to(self.device))

    def _keep(self, number: int, piece: Piece, rows: Tensor) -> None:
        self._rows[number][piece.first] = rows


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


# Gradients of layers' weights on the first supervised tokens of a training, each on the worker that owns the layer.


class Gradients:
    """Of the summed loss of the wanted tokens, by layer, for the inputs that this worker owns."""

    def __init__(
        self,
        loss: SupervisedLoss,
        targets: Mapping[str, Target],
        inputs: Sequence[LayerInput],
        owners: Sequence[int],
        store: TokenStore,
        device: torch.device,
    ) -> None:
        """`owners` has the worker of each input."""
        self.loss, self.targets, self.inputs = loss, targets, inputs
        self.store, self.device = store, device
        self._names: list[tuple[int, str | None]] = []
        """What each kind of rows is: an input, or what flows back to one of its layers."""
        kinds = []
        for number, (each, owner) in enumerate(zip(inputs, owners, strict=True)):
            for name in (None, *each.layers):
                size = each.size if name is None else targets[name].shape[0]
                self._names.append((number, name))
                kinds.append(Rows(size, each.dtype, owner))
        self.spread = Spread(kinds, self._backward, self._count, self._keep, device)
        self.sums: dict[str, Tensor] = {}
        """Name of an own layer -> m x n, float32."""
        self._x: dict[tuple[int, int], Tensor] = {}

    def held(self) -> int:
        """Bytes of the gradients that lie here."""
        return sum(part.nbytes for part in self.sums.values())

    def _count(self, piece: Piece) -> int:
        """All tokens of a sequence: what is not supervised is attended to."""
        return len(self.store[piece.sequence].input_ids)

    def _backward(self, piece: Piece) -> list[Tensor]:
        attention = self.loss.model.config._attn_implementation  # type: ignore[union-attr]
        whole = collate([self.store[piece.sequence]], str(attention)).to(self.device)
        batch = Batch(whole.inputs, whole.predicts[: piece.count], whole.labels[: piece.count], whole.tokens)
        modules = {name: self.targets[name].module for each in self.inputs for name in each.layers}
        x, g = _flows(self.loss, modules, {each.name for each in self.inputs}, batch)
        return [x[self.inputs[number].name] if name is None else g[name] for number, name in self._names]

    def _keep(self, kind: int, piece: Piece, rows: Tensor) -> None:
        number, name = self._names[kind]
        if name is None:
            self._x[number, piece.first] = rows
            return
        x = self._x[number, piece.first]
        part = rows.to(self.device, torch.float32).mT @ x.to(self.device, torch.float32)
        self.sums[name] = part if name not in self.sums else self.sums[name].add_(part)
        if name == self.inputs[number].layers[-1]:
            del self._x[number, piece.first]


def _flows(
    loss: SupervisedLoss, modules: Mapping[str, nn.Module], wanted: set[str], batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The wanted layers' inputs (tokens x n) and the gradient at all outputs (tokens x m), on the CPU."""
    x: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    with torch.enable_grad(), _watched(loss, modules, wanted, x, g):
        loss(batch).backward()
    for name in modules:
        if name not in g:
            raise UserError(f"adapter.method: no gradient reaches {name}; leave it out of adapter.targets")
        if not torch.isfinite(g[name]).all():
            raise UserError(f"model.name: the gradient at {name} has NaN or infinite values on the training data")
    return x, g


@contextmanager
def _watched(
    loss: SupervisedLoss, modules: Mapping[str, nn.Module], wanted: set[str], x: dict[str, Tensor], g: dict[str, Tensor]
) -> Iterator[None]:
    """Have what flows through these modules noted."""
    model: Any = loss.model
    # Nothing of the base is trained: gradients flow because its first hidden states are said to want one.
    handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())]
    handles += [
        module.register_forward_hook(partial(_note, name, x if name in wanted else {}, g), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(
    name: str,
    x: dict[str, Tensor],
    g: dict[str, Tensor],
    _: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    output: Tensor,
) -> None:
    entered: Tensor = inputs[0] if inputs else next(iter(named.values()))
    x[name] = entered.detach().reshape(-1, entered.shape[-1]).cpu()

    def note(gradient: Tensor) -> None:
        g[name] = gradient.reshape(-1, gradient.shape[-1]).cpu()

    output.register_hook(note)


# LoRA-GA's factors (adapter/methods/lora_ga.py), by all workers together, of the run's first supervised tokens.


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
        own |= _lora_ga_factors(found, adapter)
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


def _lora_ga_factors(found: Gradients, adapter: Adapter) -> dict[str, Factors]:
    make, options = METHODS[adapter.method].factors, options_of(adapter)
    made = {name: make(gradient, adapter.rank, 0, options) for name, gradient in found.sums.items()}
    return {
        name: Factors(item.a0.cpu(), None if item.b0 is None else item.b0.cpu(), item.full_rank)
        for name, item in made.items()
    }


# New factors for a training, by whichever way its method makes them: of the weights, or of the training data.


def new_factors(
    loss: SupervisedLoss,
    targets: Mapping[str, Target],
    config: Config,
    store: TokenStore,
    device: torch.device,
    waiting: Waiting | None = None,
) -> tuple[dict[str, Factors], InitReport, DataReport | None]:
    """A~ and B~ of every target; all workers must call it together.

    See `initialise`, `eva_factors` and `gradient_factors`. For a method that looks at data the base must be where it is
    trained, tested, and without adapters.
    """
    adapter = config.adapter
    if adapter.method not in FROM_WEIGHTS:
        make = gradient_factors if METHODS[adapter.method].needs == "gradients" else eva_factors
        return make(loss, targets, adapter, store, device, waiting)
    seed, options = config.run.seed, options_of(adapter)
    return *initialise(_whole(loss, targets), adapter.method, adapter.rank, seed, device, options), None


def _whole(loss: SupervisedLoss, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets, with all of their numbers: a sharded base has them in its files, each layer for whom it is asked."""
    if loss.files is None:
        return dict(targets)
    parameters = {name: parameter_of(loss.model, name) for name in targets}
    return {name: replace(target, read=partial(loss.files.rows, parameters[name])) for name, target in targets.items()}
