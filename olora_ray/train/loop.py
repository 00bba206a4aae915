"""The training loop as a generator of steps: the caller decides what happens between them."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import StepData, StepLoader
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.optim import AdamW, FlatAdapters
from olora_ray.train.precondition import precondition
from olora_ray.train.schedule import Schedule


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every worker but for the times."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean loss per supervised token of the global batch, before the update."""
    lr: float
    grad_norm: float
    """Before clipping, of what is clipped: after the preconditioner if there is one."""
    supervised: int
    """Supervised tokens of the global batch."""
    seconds: float
    waited: float
    """Seconds of it spent waiting for data."""
    signal: bool
    """Whether some worker had its `Trainer.signal` set."""


@dataclass
class Trainer:
    """What a worker trains."""

    loss: SupervisedLoss
    adapted: dict[str, AdaptedWeight]
    config: Config
    device: torch.device
    signal: bool = False
    """May be set at any time, on any worker: the result of the next step tells all workers."""

    def __post_init__(self) -> None:
        self.flat = FlatAdapters(self.adapted, apart=self.config.train.lr_ratio != 1)
        self.optimizer = AdamW(self.flat, self.config.train)

    def steps(self, loader: StepLoader, start: int, schedule: Schedule) -> Iterator[StepResult]:
        """Run the steps from number `start` (from 0) to the end of the schedule.

        Raises UserError when the loss or the gradient is not finite, naming step and sources.
        """
        began = time.perf_counter()
        for number, (data, waited) in enumerate(loader.steps(start, schedule.ends), start):
            self._seed(number, loader.worker)
            loss, signal = self._accumulate(number, data, loader)
            lr = schedule.lr(number)
            if self.config.train.precondition:
                precondition(self.adapted)
            norm = self.optimizer.step(lr)
            if not math.isfinite(norm):
                raise UserError(f"step {number + 1}: the gradient is not finite (norm {norm}); lower train.lr")
            now = time.perf_counter()
            yield StepResult(number + 1, loss, lr, norm, data.supervised, now - began, waited, signal)
            began = time.perf_counter()

    def _accumulate(self, number: int, data: StepData, loader: StepLoader) -> tuple[float, bool]:
        """Gradients of the global mean loss, summed over micro-batches and workers; that loss, and any signal."""
        train_mode(self.adapted, True)
        losses = []
        for batch in data.micro:
            loss: Tensor = self.loss(batch.to(self.device)) / data.supervised
            if loss.requires_grad:
                loss.backward()
            losses.append(loss.detach())
        self._keep_up(data)
        train_mode(self.adapted, False)
        total = torch.stack(losses).sum()
        # The signal travels with the loss: a second exchange per step would cost more.
        shared = torch.stack([total, torch.full_like(total, float(self.signal))])
        collectives.sum_in_place(shared)
        mean, signals = shared.tolist()
        if not math.isfinite(mean):
            raise UserError(f"step {number + 1}: {_diverged(losses, data, loader)}")
        self.flat.reduce()
        return mean, signals > 0

    def _keep_up(self, data: StepData) -> None:
        """With a sharded base all workers must run the model equally often: run it for the sake of the others."""
        if self.config.cluster.strategy != "fsdp" or collectives.world_size() == 1:
            return
        for _ in range(data.padding_batches):
            self.blank(data.micro[-1])

    def blank(self, batch: Batch) -> None:
        """Run the model forward and backward without an effect: +0.0 is added to the gradients."""
        loss: Tensor = self.loss(batch.to(self.device)) * 0.0
        if loss.requires_grad:
            loss.backward()

    def _seed(self, step: int, worker: int) -> None:
        if self.config.adapter.dropout:
            torch.manual_seed((self.config.run.seed * 1_000_003 + step) * 4099 + worker)


def train_mode(adapted: dict[str, AdaptedWeight], on: bool) -> None:
    """Turn adapter dropout on or off; the base stays in evaluation mode."""
    for layer in adapted.values():
        layer.training = on


@torch.no_grad()
def evaluate(trainer: Trainer, store: TokenStore, attention: str, worker: int = 0, workers: int = 1) -> float:
    """Mean loss per supervised token over the whole store, its sequences spread over the workers."""
    width = trainer.config.train.micro_batch
    own = list(range(worker, len(store), workers))
    total = torch.zeros(1, dtype=torch.float64, device=trainer.device)
    # With a sharded base all workers must run the model equally often: the shorter share repeats its last group.
    rounds = math.ceil(math.ceil(len(store) / workers) / width)
    for turn in range(rounds):
        group = own[turn * width : (turn + 1) * width]
        batch = collate([store[i] for i in group or [0]], attention).to(trainer.device)
        loss = trainer.loss(batch)
        if group:
            total += loss.double()
    collectives.sum_in_place(total)
    return float(total.item()) / store.manifest.supervised


def _diverged(losses: list[Tensor], data: StepData, loader: StepLoader) -> str:
    bad = [
        origin
        for loss, group in zip(losses, data.sequences, strict=True)
        if not torch.isfinite(loss)
        for index in group
        for origin in loader.store.origins(index)
    ]
    bad = [origin for part in collectives.gather(bad) for origin in part]
    shown = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    where = shown or "the sum over all workers"
    return f"the loss is not finite; it comes from {where}; look at these rows, or lower train.lr"
