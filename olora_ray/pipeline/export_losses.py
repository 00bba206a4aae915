"""The losses that an export may change."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from olora_ray.adapter.inject import remove
from olora_ray.adapter.peft_folder import Adapters
from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common.errors import first_line
from olora_ray.model.load import pick_dtype, too_large
from olora_ray.pipeline.exporter import Work
from olora_ray.pipeline.parity import with_adapter
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train.held_out import held_out
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.objectives.objective import objective_of
from olora_ray.train.parallel import load_frozen
from olora_ray.train.self_test import choose_attention

# The loss of a finished adapter before and after a change by the export (compression, original weights).


LOSS_TOKENS = 2**14
"""Largest number of tokens for a loss, because only one process measures it."""

Side = tuple[str, Adapters]
"""(model.quantization of the base model, adapter on it)."""


@dataclass(frozen=True)
class LossPair:
    """The objective's mean losses on the same rows."""

    tokens: int
    """Number of supervised tokens."""
    before: float
    after: float
    difference: float
    """after - before."""

    def in_words(self, before: str, after: str) -> str:
        """Return `1.2345 BEFORE, 1.2300 AFTER (-0.0045, on 1,234 tokens)`."""
        return (
            f"{self.before:.4f} {before}, {self.after:.4f} {after} "
            f"({self.difference:+.4f}, on {self.tokens:,} tokens)"
        )


def held_out_loss(work: Work, store: TokenStore, sides: Sequence[Side]) -> LossPair | str:
    """Return the losses of both sides on the first rows of a token store, or the reason why they are not measured."""
    config = work.spec.config
    device = assigned_device()
    why = too_large(work.base.folder, pick_dtype(config.model, device), device)
    if why:
        return why
    # The first sequences, with at most LOSS_TOKENS in total, but at least one.
    packs: list[Pack] = []
    size = 0
    for number in range(len(store)):
        pack = store[number]
        size += len(pack.input_ids)
        if packs and size > LOSS_TOKENS:
            break
        packs.append(pack)
    losses: list[float] = []
    try:
        for quantization, some in itertools.groupby(sides, lambda side: side[0]):
            adapters = [adapter for _, adapter in some]
            tokens, side_losses = _on_one_base(quantization, work, adapters, packs, device)
            losses += side_losses
    except Exception as error:
        # The model's own code may fail on this device, and the export may still be right.
        return f"the model does not run here: {first_line(error)}"
    before, after = losses
    if not math.isfinite(after - before):
        return "the loss is not finite"
    return LossPair(tokens, before, after, after - before)


def _on_one_base(
    quantization: str,
    work: Work,
    adapters: Sequence[Adapters],
    packs: Sequence[Pack],
    device: torch.device,
) -> tuple[int, list[float]]:
    config = work.spec.config
    settings = config.model.model_copy(update={"quantization": quantization})
    model: Any = load_frozen(Path(work.base.folder), settings, device)
    loss = SupervisedLoss(model).to(device)
    attention = choose_attention(loss, packs[:8], config, device).attention
    objective = objective_of(config.train)
    losses = []
    for adapter in adapters:
        with_adapter(loss.model, adapter, config.adapter.scale())
        found = held_out(loss, packs, objective, attention, config.train.micro_batch)
        losses.append(found.loss)
        remove(loss.model)
    return found.whole.supervised, losses


# The change of the loss when an adapter of a quantised base model is used with the original weights.


@dataclass(frozen=True)
class OnOriginal:
    """The loss of an adapter on the quantised base model that it was trained on, and on the original weights."""

    quantization: str
    """model.quantization during training."""
    rows: Literal["held-out", "training"]
    """The rows of the loss; training rows if no rows are held out."""
    loss: LossPair | str
    """Losses on the quantised base model and on the original weights, or the reason why they are not measured."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "in_words": self.in_words()}

    def in_words(self, reasons: bool = True) -> str:
        # The model card is public: without `reasons` the sentence has no paths or errors of this machine.
        start = (
            f"trained on the base model as {self.quantization}, exported for the original weights"
        )
        name = "held-out loss" if self.rows == "held-out" else "loss on training rows"
        if isinstance(self.loss, str):
            why = f": {self.loss}" if reasons else ""
            return f"{start}; the {name} was not compared{why}"
        return f"{start}: {name} {self.loss.in_words('on the quantised base model', 'on the original weights')}"


def loss_on_original(work: Work) -> OnOriginal | None:
    """Return the loss of the adapter on both base models; None if training used no quantisation."""
    spec = work.spec
    quantization = spec.config.model.quantization
    if quantization == "none":
        return None
    sides = [(quantization, work.adapter), ("none", work.adapter)]
    loss = held_out_loss(work, spec.eval or spec.train, sides)
    return OnOriginal(quantization, "held-out" if spec.eval else "training", loss)


# The cost of export.rank: the share of the weights' change that is lost, and the held-out loss.


@dataclass(frozen=True)
class Compressed:
    rank: int
    lost: float
    """Share of the change of the weights that is lost, in the Frobenius norm."""
    loss: LossPair | str | None = None
    """Losses with the trained and with the compressed adapter, or the reason why they are not measured; None if nothing
    is lost."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def in_words(self, reasons: bool = True) -> str:
        share = f"{self.lost:.2%} of the change of the weights is lost"
        if self.loss is None:
            return share
        if isinstance(self.loss, str):
            why = f": {self.loss}" if reasons else ""
            return f"{share}; the held-out loss is not measured{why}"
        return f"{share}; held-out loss {self.loss.in_words('before compression', 'after')}"


def compressed_loss(work: Work, smaller: Adapters) -> LossPair | str:
    """Return held-out losses with the trained and the smaller adapter on the stored weights, or why there are none."""
    if work.spec.eval is None:
        return "no rows are held out"
    return held_out_loss(work, work.spec.eval, [("none", work.adapter), ("none", smaller)])
