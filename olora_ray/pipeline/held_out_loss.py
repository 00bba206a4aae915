"""The loss of a finished adapter before and after what an export does to it, in one process."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from olora_ray.adapter import memory
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.inject import inject, remove
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import first_line
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.model.folder import parameters
from olora_ray.model.load import pick_dtype
from olora_ray.pipeline.export_shares import Work
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.quantised_base import load_frozen
from olora_ray.train.self_test import choose_attention

LOSS_TOKENS = 2**14
"""Tokens on which a loss is measured: one process does it, where a training has all workers."""
TRIED = 8
"""Sequences from which the self-test takes its examples."""

Adapter = Mapping[str, AdapterWeights]


@dataclass(frozen=True)
class Side:
    """An adapter on a base."""

    adapter: Adapter
    quantization: str = "none"
    """Of the base."""


@dataclass(frozen=True)
class LossPair:
    """Mean loss per supervised token of the same rows."""

    tokens: int
    """Supervised ones."""
    before: float
    after: float
    difference: float
    """after - before."""

    def in_words(self, before: str, after: str) -> str:
        """`1.2345 BEFORE, 1.2300 AFTER (-0.0045, on 1,234 tokens)`."""
        return (
            f"{self.before:.4f} {before}, {self.after:.4f} {after} ({self.difference:+.4f}, on {self.tokens:,} tokens)"
        )


def measure(
    spec: TrainSpec, work: Work, store: TokenStore, before: Side, after: Side, device: torch.device
) -> LossPair | str:
    """The training's loss on the first rows of a store with both, or why it is not measured."""
    dtype = pick_dtype(spec.config.model, device)
    if why := memory.too_large(parameters(str(work.base)), dtype, device):
        return why
    try:
        found = _measured(spec.config, work, (before, after), _first(store), device)
    except Exception as error:  # of the model's own code: what it cannot do here says nothing of the export
        return f"the model does not run here: {first_line(error)}"
    return found if math.isfinite(found.difference) else "it is not finite"


def _measured(
    config: Config, work: Work, sides: Sequence[Side], packs: Sequence[Pack], device: torch.device
) -> LossPair:
    losses: list[float] = []
    tokens = 0
    for kind, some in itertools.groupby(sides, lambda side: side.quantization):
        own = override(config, {"model.quantization": kind})
        tokens, found = _on_one_base(own, work, [side.adapter for side in some], packs, device)
        losses += found
    before, after = losses
    return LossPair(tokens, before, after, after - before)


def _on_one_base(
    config: Config, work: Work, adapters: Sequence[Adapter], packs: Sequence[Pack], device: torch.device
) -> tuple[int, list[float]]:
    """(supervised tokens, the loss with each adapter)."""
    model: Any = load_frozen(work.base, config.model, device)
    loss = SupervisedLoss(model).to(device)
    attention = choose_attention(loss, packs[:TRIED], config, device).attention
    width = config.train.micro_batch
    batches = [collate(packs[place : place + width], attention) for place in range(0, len(packs), width)]
    losses = []
    for adapter in adapters:
        with _adapted(loss, adapter, config.adapter.scale(), device):
            losses.append(_mean(loss, batches, device))
    return sum(len(batch.labels) for batch in batches), losses


@contextmanager
def _adapted(loss: SupervisedLoss, adapter: Adapter, scale: float, device: torch.device) -> Iterator[None]:
    layers = inject(loss.model, {name: weights.factors for name, weights in adapter.items()}, scale)
    for name, layer in layers.items():
        layer.da.data.copy_(adapter[name].da)
        layer.db.data.copy_(adapter[name].db)
        layer.to(device)
    try:
        yield
    finally:
        remove(loss.model)


@torch.no_grad()
def _mean(loss: SupervisedLoss, batches: Sequence[Batch], device: torch.device) -> float:
    total = sum(float(loss(batch.to(device)).double()) for batch in batches)
    return total / sum(len(batch.labels) for batch in batches)


def _first(store: TokenStore) -> list[Pack]:
    """The first sequences, of LOSS_TOKENS in all at most, but one."""
    found: list[Pack] = []
    tokens = 0
    for number in range(store.available):
        pack = store[number]
        tokens += len(pack.input_ids)
        if found and tokens > LOSS_TOKENS:
            break
        found.append(pack)
    return found
