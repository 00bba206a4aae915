"""What a compressed adapter has lost: a share of the change of the weights, and what that costs on held-out rows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from olora_ray.adapter import memory
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.inject import inject, remove
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import first_line
from olora_ray.model.folder import parameters
from olora_ray.model.load import load_model, pick_dtype
from olora_ray.pipeline.export_shares import Work
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import choose_attention

LOSS_TOKENS = 2**14
"""Held-out tokens on which both adapters are measured: one process does it, where a training has all workers."""
TRIED = 8
"""Sequences from which the self-test takes its examples."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss per supervised token of the same held-out rows."""

    tokens: int
    """Supervised ones."""
    before: float
    """With the adapter as trained."""
    after: float
    """With the compressed one."""
    difference: float
    """after - before."""


@dataclass(frozen=True)
class Compressed:
    """An adapter that was exported at a smaller rank than it was trained at."""

    rank: int
    lost: float
    """Share of the change of the weights, in the Frobenius norm."""
    loss: HeldOutLoss | str | None = None
    """Or why it was not measured; None where nothing is lost."""

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def in_words(self, reasons: bool = True) -> str:
        """One sentence; without `reasons` nothing in it comes from an error on this machine."""
        share = f"{self.lost:.2%} of the change of the weights is lost"
        if self.loss is None:
            return share
        if isinstance(self.loss, str):
            return f"{share}; the held-out loss is not measured{f': {self.loss}' if reasons else ''}"
        found = self.loss
        return (
            f"{share}; held-out loss {found.before:.4f} before compression, {found.after:.4f} after"
            f" ({found.difference:+.4f}, on {found.tokens:,} tokens)"
        )


def measure(
    spec: TrainSpec, work: Work, smaller: Mapping[str, AdapterWeights], device: torch.device
) -> HeldOutLoss | str:
    """The training's loss on held-out rows with the adapter of `work` and with `smaller`, or why it is not measured."""
    if spec.eval is None:
        return "no rows are held out"
    dtype = pick_dtype(spec.config.model, device)
    if why := memory.too_large(parameters(str(work.base)), dtype, device):
        return why
    try:
        found = _measured(spec, work, smaller, _first(spec.eval), device)
    except Exception as error:  # of the model's own code: what it cannot do here says nothing of the export
        return f"the model does not run here: {first_line(error)}"
    return found if math.isfinite(found.difference) else "it is not finite"


def _measured(
    spec: TrainSpec, work: Work, smaller: Mapping[str, AdapterWeights], packs: Sequence[Pack], device: torch.device
) -> HeldOutLoss:
    config = spec.config
    model: Any = load_model(work.base, config.model, device)
    loss = SupervisedLoss(model).to(device)
    attention = choose_attention(loss, packs[:TRIED], config, device).attention
    width = config.train.micro_batch
    batches = [collate(packs[place : place + width], attention) for place in range(0, len(packs), width)]
    losses = []
    for adapter in (work.adapter, smaller):
        with _adapted(loss, adapter, config.adapter.scale(), device):
            losses.append(_mean(loss, batches, device))
    before, after = losses
    return HeldOutLoss(sum(len(batch.labels) for batch in batches), before, after, after - before)


@contextmanager
def _adapted(
    loss: SupervisedLoss, adapter: Mapping[str, AdapterWeights], scale: float, device: torch.device
) -> Iterator[None]:
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
    for number in range(len(store)):
        pack = store[number]
        tokens += len(pack.input_ids)
        if found and tokens > LOSS_TOKENS:
            break
        found.append(pack)
    return found
