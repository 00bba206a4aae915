"""The training loop as a generator of steps: the caller decides what happens between them."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight, AdapterWeights, Factors
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.tokens import plan
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint, first_step, tree
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loader import Schedule, StepData, StepLoader
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.optimizers import FlatAdapters, optimizer_named


# The result of an optimizer step is the same on every worker, except for the times.
@dataclass(frozen=True)
class StepResult:
    step: int
    """Number of steps done, this step included."""
    loss: float
    """Mean loss per supervised token of the global batch, before the update."""
    lr: float
    grad_norm: float
    """Norm after the preconditioner, if there is one, and before clipping."""
    tokens: int
    supervised: int
    seconds: float
    waited: float
    """Seconds spent waiting for data, included in `seconds`."""
    signal: bool
    """True if `Trainer.signal` of some worker was true when the worker had computed its part of the step."""


@dataclass
class Trainer:
    loss: SupervisedLoss
    adapted: dict[str, AdaptedWeight]
    config: Config
    device: torch.device
    signal: Callable[[], bool] = lambda: False
    """Called in each step on each worker, at the last moment at which the result can still reach all workers."""
    sizes: Mapping[str, Tensor] = field(default_factory=dict)
    """`weight_sizes` of the adapted weights, if `Optimizer.sizes` asks for them; a checkpoint has them, too."""

    def __post_init__(self) -> None:
        self.flat = FlatAdapters(self.adapted, apart=self.config.train.lr_ratio != 1)
        chosen = optimizer_named(self.config.train.optimizer)
        self.optimizer = chosen.begin(self.flat, self.config.train, self.sizes)
        self.gradient = tree.TreeSum(self.flat.grad)

    def steps(self, loader: StepLoader, start: int, schedule: Schedule) -> Generator[StepResult]:
        """Run the steps from `start` (counted from 0) to the end of the schedule.

        Raises UserError with the step and the source rows if the loss or the gradient is not finite.
        """
        began = time.perf_counter()
        for number, (data, waited) in enumerate(loader.steps(start, schedule.ends), start):
            losses = self._accumulate(number, data)
            shared = self._shared(losses, data)
            self.gradient.finish()
            self.optimizer.prepare()
            # The only wait for the device in a step: losses, signal and norm come to the CPU in one copy.
            numbers = torch.cat([shared, self.flat.grad.norm()[None]]).cpu()
            loss, (signal, norm) = float(tree.total(numbers[:-2])), numbers[-2:].tolist()
            if not math.isfinite(loss):
                raise UserError(f"step {number + 1}: {_diverged(losses, data, loader)}")
            if not math.isfinite(norm):
                raise UserError(
                    f"step {number + 1}: the gradient is not finite (norm {norm}); lower train.lr"
                )
            lr = schedule.lr(number)
            self.optimizer.step(lr, norm)
            now = time.perf_counter()
            tokens = (data.tokens, data.supervised)
            yield StepResult(number + 1, loss, lr, norm, *tokens, now - began, waited, signal > 0)
            began = time.perf_counter()

    def automatic_rate(self, packs: Sequence[Pack], steps: int, attention: str) -> float | None:
        """Return the peak learning rate for a training of `steps` steps; None if only stacked experts are adapted.

        All workers must call it together, with the same sequences.
        """
        known = optimizer_named(self.config.train.optimizer).rate
        if known is not None:
            return first_step.for_steps(known(self.config.adapter.rank), steps)
        batch = collate(first_step.examples(packs), attention).to(self.device)
        moves = first_step.moves(self.loss, self.adapted, batch, self.config.train.lr_ratio)
        moves = collectives.from_first(
            moves
        )  # another type of processor would find other last bits
        return first_step.best_rate(moves, self.config.adapter.scale(), steps) if moves else None

    @staticmethod
    def rate_for(steps: int, rate: float, made_for: int) -> float:
        """Return the automatic rate of a training of `steps` steps, from that of a training of `made_for` steps."""
        return first_step.for_steps(rate, steps, made_for)

    def snapshot(
        self, state: TrainState, best: Tensor | None, identity: Mapping[str, str], config_yaml: str
    ) -> Callable[[Path], None]:
        """Copy the current state, and return a function that writes it into a folder, later or in another thread.

        `best` is the flat vector of the best evaluation so far.
        """
        vector = self.flat.named(self.flat.vector.detach().to("cpu", copy=True))
        adapter = {
            name: AdapterWeights(factors, vector[f"{name}.da"], vector[f"{name}.db"])
            for name, factors in self._frozen.items()
        }
        optimizer = self.optimizer.state(copied_to="cpu")
        best_parts = None
        if best is not None and state.best_step != state.step:
            # Not copied if it is on the CPU, because a better adapter gets a new vector instead of changing this one.
            best_parts = self.flat.named(best.to("cpu"))
        state = replace(state, history=list(state.history))
        return lambda folder: checkpoint.save(
            folder, adapter, best_parts, optimizer, state, identity, config_yaml
        )

    @cached_property
    def _frozen(self) -> dict[str, Factors]:
        # The factors do not change, so they are copied to the CPU once for all checkpoints.
        return {name: layer.weights().factors.on_cpu() for name, layer in self.adapted.items()}

    def _accumulate(self, number: int, data: StepData) -> list[Tensor]:
        """Sum this worker's part of the gradient of the global mean loss; return the parts of its micro-batches."""
        losses = []
        self.gradient.begin(data.count)
        train_mode(self.adapted, True)
        self.loss.compiled = self.loss.compile_blocks
        # With a sharded base all workers must run the model equally often, so a worker with fewer micro-batches runs
        # it on padding. This comes first, because each real micro-batch starts with a new gradient and a new seed.
        if self.config.cluster.strategy == "fsdp" and collectives.world_size() > 1:
            for _ in range(data.padding_batches):
                self._backward(data.padding, data.supervised)
        for micro_batch, batch in enumerate(data.micro, data.first):
            if self.config.adapter.dropout:
                torch.manual_seed(
                    plan.key("dropout", self.config.run.seed, number, micro_batch) >> 1
                )  # of 63 bits
            with self.gradient.leaf(micro_batch):
                losses.append(self._backward(batch, data.supervised))
        train_mode(self.adapted, False)
        self.loss.compiled = False
        return losses

    def _backward(self, batch: Batch, supervised: int) -> Tensor:
        loss: Tensor = self.loss(batch.to(self.device)) / supervised
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def _shared(self, losses: list[Tensor], data: StepData) -> Tensor:
        """Return the losses of the step's micro-batches, and a last number that is above 0 if some worker signals."""
        # The signal travels with the losses, because a second exchange per step would cost more. The order of this sum
        # does not change its bits, because only one worker has a loss for a micro-batch, and all others have 0.
        shared = torch.zeros(data.count + 1, device=self.device)
        for index, loss in enumerate(losses, data.first):
            shared[index] = loss
        shared[-1].fill_(self.signal())  # an assignment would wait for the device
        collectives.sum_in_place(shared)
        return shared


# Only the dropout of adapters is turned on or off; the base stays in evaluation mode.
def train_mode(adapted: dict[str, AdaptedWeight], on: bool) -> None:
    for layer in adapted.values():
        layer.training = on


@torch.no_grad()
def evaluate(
    trainer: Trainer,
    store: TokenStore,
    attention: str,
    worker: int = 0,
    workers: int = 1,
    step: int = 0,
) -> float:
    """Return the mean loss per supervised token over the whole store; all workers must call it together.

    The workers share groups of train.micro_batch sequences. The groups, and the order of their sum, do not depend on
    the number of workers. `step` is the number of steps done, for messages. Raises UserError on all workers, with the
    step and the source rows, if the loss is not finite.
    """
    groups = _groups(trainer, store)
    losses = torch.zeros(len(groups), dtype=torch.float64, device=trainer.device)
    for number, batch in _shares(trainer, store, attention, worker, workers):
        loss = trainer.loss(batch)
        if number < len(groups):
            losses[number] = loss
    collectives.sum_in_place(losses)
    summed = losses.cpu()
    total = float(tree.total(summed))
    if not math.isfinite(total):
        failed = [number for number, loss in enumerate(summed.tolist()) if not math.isfinite(loss)]
        origins = [
            origin
            for number in failed
            for index in groups[number]
            for origin in store.origins(index)
        ]
        raise UserError(_held_out_not_finite(origins, step))
    return total / store.manifest.supervised


@torch.no_grad()
def evaluate_examples(
    trainer: Trainer,
    store: TokenStore,
    attention: str,
    worker: int = 0,
    workers: int = 1,
    step: int = 0,
) -> list[float]:
    """Return the loss of each example, summed over its supervised tokens; otherwise as `evaluate`."""
    by_sequence = supervised_of(store)
    sizes, starts = list(chain(*by_sequence)), np.cumsum([0, *map(len, by_sequence)])
    groups = _groups(trainer, store)
    losses = torch.zeros(len(sizes), dtype=torch.float64, device=trainer.device)
    for number, batch in _shares(trainer, store, attention, worker, workers):
        each = trainer.loss(batch, each=True).double()
        if number < len(groups):
            own = slice(int(starts[groups[number].start]), int(starts[groups[number].stop]))
            losses[own] = torch.stack([part.sum() for part in each.split(sizes[own])])
    collectives.sum_in_place(losses)
    if not losses.isfinite().all():
        origins = [origin for index in range(len(store)) for origin in store.origins(index)]
        bad = [
            origin
            for origin, loss in zip(origins, losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        raise UserError(_held_out_not_finite(bad, step))
    return losses.tolist()


def supervised_of(store: TokenStore) -> list[list[int]]:
    """Return the numbers of supervised tokens of each sequence's examples."""
    packs = (store[index] for index in range(len(store)))
    return [
        [int(part.sum()) for part in np.split(each.supervised, np.cumsum(each.segments)[:-1])]
        for each in packs
    ]


def _groups(trainer: Trainer, store: TokenStore) -> list[range]:
    width = trainer.config.train.micro()
    return [range(len(store))[first : first + width] for first in range(0, len(store), width)]


def _shares(
    trainer: Trainer, store: TokenStore, attention: str, worker: int, workers: int
) -> Generator[tuple[int, Batch]]:
    groups = _groups(trainer, store)
    # With a sharded base all workers must run the model equally often, so a worker with fewer groups repeats group 0.
    rounds = -(-len(groups) // workers) if trainer.loss.sharded else len(groups[worker::workers])
    for number in range(worker, worker + rounds * workers, workers):
        group = groups[number] if number < len(groups) else groups[0]
        yield number, collate([store[i] for i in group], attention).to(trainer.device)


def _held_out_not_finite(origins: Sequence[str], step: int) -> str:
    # Before the first step another learning rate would change nothing.
    return (
        f"step {step}: the held-out {_not_finite(origins)}{', or lower train.lr' if step else ''}"
    )


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
    return (
        f"loss is not finite; it comes from {shown or 'the sum over all workers'}; check these rows"
    )
