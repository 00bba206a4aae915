"""The training loop as a generator of steps: the caller decides what happens between them."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight, AdapterWeights, Factors
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.tokens import plan
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint, tree
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loader import Schedule, StepData, StepLoader
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.optim import AdamW, FlatAdapters, precondition


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
    """True if `Trainer.signal` of some worker was true when it had computed its part of the step."""


@dataclass
class Trainer:
    """The training of a worker."""

    loss: SupervisedLoss
    adapted: dict[str, AdaptedWeight]
    config: Config
    device: torch.device
    signal: Callable[[], bool] = lambda: False
    """Asked in each step, on each worker, as late as all workers can still be told by the result of that step."""

    def __post_init__(self) -> None:
        self.flat = FlatAdapters(self.adapted, apart=self.config.train.lr_ratio != 1)
        self.optimizer = AdamW(self.flat, self.config.train)
        self.gradient = tree.TreeSum(self.flat.grad)

    def steps(self, loader: StepLoader, start: int, schedule: Schedule) -> Generator[StepResult]:
        """Run the steps from number `start` (from 0) to the end of the schedule.

        Raises UserError when the loss or the gradient is not finite, naming step and sources.
        """
        began = time.perf_counter()
        for number, (data, waited) in enumerate(loader.steps(start, schedule.ends), start):
            losses = self._accumulate(number, data)
            shared = self._shared(losses, data)
            self.gradient.finish()
            if self.config.train.precondition:
                precondition(self.adapted)
            # The only time in a step that the device is waited for.
            told = torch.cat([shared, self.flat.grad.norm()[None]]).cpu()
            loss, (signal, norm) = float(tree.total(told[:-2])), told[-2:].tolist()
            if not math.isfinite(loss):
                raise UserError(f"step {number + 1}: {_diverged(losses, data, loader)}")
            if not math.isfinite(norm):
                raise UserError(f"step {number + 1}: the gradient is not finite (norm {norm}); lower train.lr")
            lr = schedule.lr(number)
            self.optimizer.step(lr, norm)
            now = time.perf_counter()
            yield StepResult(number + 1, loss, lr, norm, data.supervised, now - began, waited, signal > 0)
            began = time.perf_counter()

    def snapshot(
        self, state: TrainState, best: Tensor | None, identity: Mapping[str, str], config_yaml: str
    ) -> Callable[[Path], None]:
        """Return a function that writes the current state into a folder later: what training changes is copied.

        `best` is the flat vector of the best evaluation so far.
        """
        vector = self.flat.named(self.flat.vector.detach().to("cpu", copy=True))
        adapter = {
            name: AdapterWeights(factors, vector[f"{name}.da"], vector[f"{name}.db"])
            for name, factors in self._frozen.items()
        }
        optimizer = self.optimizer.state(copied_to="cpu")
        other = None
        if best is not None and state.best_step != state.step:
            other = self.flat.named(best.to("cpu"))  # not copied on a CPU: a better adapter gets a vector of its own
        state = replace(state, history=list(state.history))
        return lambda folder: checkpoint.save(folder, adapter, other, optimizer, state, identity, config_yaml)

    @cached_property
    def _frozen(self) -> dict[str, Factors]:
        """The factors on the CPU, copied there once."""
        return {name: layer.weights().factors.on_cpu() for name, layer in self.adapted.items()}

    def _accumulate(self, number: int, data: StepData) -> list[Tensor]:
        """Sum up this worker's part of the gradient of the global mean loss; return its micro-batches' parts of it."""
        losses = []
        self.gradient.begin(data.count)
        train_mode(self.adapted, True)
        # With a sharded base all workers must run the model equally often: run it for the sake of the others. This
        # comes first: each micro-batch begins with a gradient and random numbers of its own.
        if self.config.cluster.strategy == "fsdp" and collectives.world_size() > 1:
            for _ in range(data.padding_batches):
                self._backward(data.padding, data.supervised)
        for micro_batch, batch in enumerate(data.micro, data.first):
            if self.config.adapter.dropout:
                torch.manual_seed(plan.key("dropout", self.config.run.seed, number, micro_batch) >> 1)  # of 63 bits
            with self.gradient.leaf(micro_batch):
                losses.append(self._backward(batch, data.supervised))
        train_mode(self.adapted, False)
        return losses

    def _backward(self, batch: Batch, supervised: int) -> Tensor:
        """Add to the gradient that of a micro-batch's part of the loss; returns that part."""
        loss: Tensor = self.loss(batch.to(self.device)) / supervised
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def _shared(self, losses: list[Tensor], data: StepData) -> Tensor:
        """The losses of the step's micro-batches, on the device; the last number is above 0 if some worker signals."""
        # The signal travels with the losses: a second exchange per step would cost more. One worker has the loss of a
        # micro-batch and all others zero, so that no order of this sum changes it.
        shared = torch.zeros(data.count + 1, device=self.device)
        for place, loss in enumerate(losses, data.first):
            shared[place] = loss
        shared[-1] = float(self.signal())
        collectives.sum_in_place(shared)
        return shared


def train_mode(adapted: dict[str, AdaptedWeight], on: bool) -> None:
    """Turn adapter dropout on or off; the base stays in evaluation mode."""
    for layer in adapted.values():
        layer.training = on


@torch.no_grad()
def evaluate(
    trainer: Trainer, store: TokenStore, attention: str, worker: int = 0, workers: int = 1, step: int = 0
) -> float:
    """Mean loss per supervised token over the whole store, its groups of micro_batch sequences spread over the workers.

    The groups and the order in which they are summed do not depend on the workers. Raises UserError, the same on all
    workers, when it is not finite, naming the step after which it is measured, and sources.
    """
    width = trainer.config.train.micro_batch
    groups = [range(len(store))[first : first + width] for first in range(0, len(store), width)]
    losses = torch.zeros(len(groups), dtype=torch.float64, device=trainer.device)
    # With a sharded base all workers must run the model equally often: who has fewer groups repeats the first of all.
    rounds = -(-len(groups) // workers) if hasattr(trainer.loss, "unshard") else len(groups[worker::workers])
    for number in range(worker, worker + rounds * workers, workers):
        group = groups[number] if number < len(groups) else groups[0]
        loss = trainer.loss(collate([store[i] for i in group], attention).to(trainer.device))
        if number < len(groups):
            losses[number] = loss
    collectives.sum_in_place(losses)
    found = losses.cpu()
    total = float(tree.total(found))
    if not math.isfinite(total):
        bad = [number for number, loss in enumerate(found.tolist()) if not math.isfinite(loss)]
        origins = [origin for number in bad for index in groups[number] for origin in store.origins(index)]
        # Before the first step there is nothing that another learning rate would change.
        raise UserError(f"step {step}: the held-out {_not_finite(origins)}{', or lower train.lr' if step else ''}")
    return total / store.manifest.supervised


def _diverged(losses: list[Tensor], data: StepData, loader: StepLoader) -> str:
    bad = [
        origin
        for loss, group in zip(losses, data.sequences, strict=True)
        if not torch.isfinite(loss)
        for index in group
        for origin in loader.store.origins(index)
    ]
    bad = [origin for part in collectives.gather(bad) for origin in part]
    return f"the {_not_finite(bad)}, or lower train.lr"


def _not_finite(origins: Sequence[str]) -> str:
    shown = ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")
    return f"loss is not finite; it comes from {shown or 'the sum over all workers'}; look at these rows"
