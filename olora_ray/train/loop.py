"""The training loop as a generator of steps: the caller decides what happens between them."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight, AdapterWeights, Factors
from olora_ray.adapter.optimizers.optimizer import FlatAdapters, optimizer_named
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.common.text import some
from olora_ray.config.decided import DecidedConfig
from olora_ray.tokens import plan
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint, first_step, tree
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loader import Schedule, StepData, StepLoader
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.objectives.objective import objective_of


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step, the same on every worker but for the times."""

    step: int
    """Number of steps done, this step included."""
    times: Sequence["Times"]
    """One per worker, in the order of the ranks."""
    loss: float
    """The objective's mean over the global batch, before the update: mean loss per supervised token."""
    lr: float
    grad_norm: float
    """Norm after the preconditioner, if there is one, and before clipping."""
    tokens: int
    supervised: int
    signal: bool
    """True if `Trainer.signal` of some worker was true when the worker had computed its part of the step."""
    means: Mapping[str, float] = field(default_factory=dict)
    """The objective's means by name (`Objective.named`)."""
    seconds: float = 0.0


class Times(NamedTuple):
    """Seconds of a worker. All workers learn them with the losses of a step, so two are of the step before."""

    waited: float
    """Waiting for the data of this step."""
    computed: float = 0.0
    """Computation of the step before, as long as it would be with the largest share of micro-batches.

    0 after a start, and for a worker without micro-batches.
    """
    exchanged: float = 0.0
    """Exchange of the step before; includes waiting for slower workers."""


def moment(device: torch.device) -> Any:
    """Return this moment of the work that `device` was given; no wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(first: Any, last: Any) -> float:
    """Return the seconds between two moments that the device has passed."""
    if isinstance(first, float):
        return float(last - first)
    return float(first.elapsed_time(last)) / 1000.0


@dataclass(frozen=True)
class StepNumbers:
    """The numbers that workers exchange in a step beside the gradient: one vector, so that one exchange carries them.

    Each worker fills in its own micro-batches and times, and the others have 0 there. So the order of the sum over
    workers changes no bit.
    """

    vector: Tensor
    micro_batches: int
    width: int
    """Number of numbers of a micro-batch: its loss and the objective's `more`."""

    @classmethod
    def zeros(cls, micro_batches: int, width: int, device: torch.device) -> "StepNumbers":
        times = collectives.world_size() * len(Times._fields)
        vector = torch.zeros(micro_batches * width + times + 2, device=device)
        return cls(vector, micro_batches, width)

    @property
    def sums(self) -> Tensor:
        """(micro-batches, width) numbers of the objective, divided by the weight of the global batch."""
        return self.vector[: self.micro_batches * self.width].view(-1, self.width)

    @property
    def times(self) -> Tensor:
        """(workers, fields of Times)."""
        return self.vector[self.micro_batches * self.width : -2].view(-1, len(Times._fields))

    @property
    def signal(self) -> Tensor:
        """Number of workers that signal."""
        return self.vector[-2]

    @property
    def norm(self) -> Tensor:
        """Norm of the gradient; not exchanged, because every worker computes the same."""
        return self.vector[-1]

    def on_cpu(self) -> "StepNumbers":
        return replace(self, vector=self.vector.cpu())


@dataclass
class Trainer:
    loss: SupervisedLoss
    adapted: dict[str, AdaptedWeight]
    config: DecidedConfig
    device: torch.device
    signal: Callable[[], bool] = lambda: False
    """Called in each step on each worker, at the last moment at which the result can still reach all workers."""
    sizes: Mapping[str, Tensor] = field(default_factory=dict)
    """`weight_sizes` of the adapted weights, if `Optimizer.sizes` asks for them; a checkpoint has them, too."""

    def __post_init__(self) -> None:
        self.objective = objective_of(self.config.train)
        self.flat = FlatAdapters(self.adapted, apart=self.config.train.lr_ratio != 1)
        chosen = optimizer_named(self.config.train.optimizer)
        self.optimizer = chosen.begin(self.flat, self.config.train, self.sizes)
        self.gradient = tree.TreeSum(self.flat.grad)
        self._times = Times(0.0)

    def steps(self, loader: StepLoader, start: int, schedule: Schedule) -> Generator[StepResult]:
        """Run the steps from `start` (counted from 0) to the end of the schedule; raises as `step`."""
        began = time.perf_counter()
        for number, (data, waited) in enumerate(loader.steps(start, schedule), start):
            self._times = self._times._replace(waited=waited)
            result = self.step(number, data, schedule)
            yield replace(result, seconds=time.perf_counter() - began)
            began = time.perf_counter()

    def step(self, number: int, data: StepData, schedule: Schedule) -> StepResult:
        """Do step `number`, counted from 0: the gradient of the global mean loss, and one update.

        The micro-batches, and the order of each sum, depend on the step alone and not on the workers. Raises UserError
        with the step and the source rows if the loss or the gradient is not finite.
        """
        began = moment(self.device)
        objective = self.objective
        whole = data.whole
        weight_of_step = objective.weight(whole)
        numbers = StepNumbers.zeros(data.count, objective.numbers, self.device)
        self.gradient.begin(data.count)
        self.set_training(True)

        # With a sharded base all workers must run the model equally often, so a worker with fewer micro-batches runs
        # it on padding. This comes first, because each real micro-batch starts with a new gradient and a new seed.
        if self.loss.sharded:
            for _ in range(data.padding_batches):
                padding_sums = objective.loss(self.loss, data.padding.to(self.device), whole)
                if padding_sums.requires_grad:
                    padding_sums[0].backward()

        # Each micro-batch writes its gradient into one vector, and `leaf` adds it to the sum over the step.
        for micro_batch, batch in enumerate(data.micro, data.first):
            if self.config.adapter.dropout:
                seed = plan.key("dropout", self.config.run.seed, number, micro_batch)
                torch.manual_seed(seed >> 1)  # of 63 bits
            with self.gradient.leaf(micro_batch):
                sums = objective.loss(self.loss, batch.to(self.device), whole)
                parts_of_mean = sums / weight_of_step
                if parts_of_mean.requires_grad:
                    parts_of_mean[0].backward()
                numbers.sums[micro_batch] = parts_of_mean.detach()
        self.set_training(False)

        # The signal travels with the losses, because a second exchange per step would cost more.
        numbers.signal.fill_(self.signal())  # an assignment would wait for the device
        for place, seconds in zip(numbers.times[collectives.rank()], self._times, strict=True):
            place.fill_(seconds)
        computed = moment(self.device)
        collectives.sum_in_place(numbers.vector)
        self.gradient.finish()
        exchanged = moment(self.device)
        self.optimizer.prepare()

        # The only wait for the device in a step: losses, signal and norm come to the CPU in one copy.
        numbers.norm.copy_(self.flat.grad.norm())
        known = numbers.on_cpu()
        means = objective.named(tree.total(known.sums).tolist(), whole)
        mean_loss = next(iter(means.values()))
        most = len(data.micro) + data.padding_batches
        runs = len(data.micro)
        if self.loss.sharded:
            runs = most
        spent = 0.0
        if runs:
            spent = between(began, computed) * most / runs
        self._times = Times(0.0, spent, between(computed, exchanged))
        norm = float(known.norm)
        if not math.isfinite(mean_loss):
            rows = rows_of_odd_losses(known.sums[:, 0], data, schedule.store)
            raise UserError(f"step {number + 1}: the {not_finite(rows)}, or lower train.lr")
        if not math.isfinite(norm):
            raise UserError(
                f"step {number + 1}: the gradient is not finite (norm {norm}); lower train.lr"
            )

        lr = schedule.lr(number)
        self.optimizer.step(lr, norm)
        return StepResult(
            step=number + 1,
            times=[Times(*seconds) for seconds in known.times.tolist()],
            loss=mean_loss,
            lr=lr,
            grad_norm=norm,
            tokens=whole.tokens,
            supervised=whole.supervised,
            signal=float(known.signal) > 0,
            means=means,
        )

    def automatic_rate(self, packs: Sequence[Pack], steps: int, attention: str) -> float | None:
        """Return the peak learning rate for a training of `steps` steps; None if only stacked experts are adapted.

        All workers must call it together, with the same sequences.
        """
        known = optimizer_named(self.config.train.optimizer).rate
        if known is not None:
            rate = first_step.for_steps(known(self.config.adapter.rank), steps)
            return self._limited(rate, packs, attention)
        batch = collate(first_step.examples(packs), attention).to(self.device)
        moves = first_step.output_shift(self.loss, self.adapted, batch, self.config.train.lr_ratio)
        # Another type of processor would find other last bits.
        moves = collectives.from_first(moves)
        if not moves:
            return None
        rate = first_step.peak_lr(moves, self.config.adapter.scale(), steps)
        return self._limited(rate, packs, attention)

    def _limited(self, rate: float, packs: Sequence[Pack], attention: str) -> float:
        """Return the rate for this objective: one at which the first step moves other rows by `Objective.fall` at most.

        The step is one on half of the sequences, and its effect is that on the other half, to first order.
        """
        rate *= self.objective.rate
        most = self.objective.fall
        if most is None:
            return rate
        gradients = []
        for half in (packs[1::2] or packs, packs[::2]):
            whole = sum(chain.from_iterable(pack.examples() for pack in half), plan.Counts())
            weight = self.objective.weight(whole)
            self.flat.grad.zero_()
            for pack in half:  # one at a time, which needs no more memory than a step
                batch = collate([pack], attention).to(self.device)
                sums = self.objective.loss(self.loss, batch, whole)
                (sums[0] / weight).backward()
            gradients.append(self.flat.grad.clone())
        before = self.flat.vector.clone()
        chosen = optimizer_named(self.config.train.optimizer)
        trial = chosen.begin(self.flat, self.config.train, self.sizes)
        trial.prepare()
        trial.step(rate)
        fall = collectives.from_first(float(gradients[0] @ (before - self.flat.vector)))
        self.flat.vector.copy_(before)
        self.flat.grad.zero_()
        return float(f"{rate * most / max(most, fall):.1e}")

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

    def set_training(self, on: bool) -> None:
        train_mode(self.adapted, on)

    @cached_property
    def _frozen(self) -> dict[str, Factors]:
        # The factors do not change, so they are copied to the CPU once for all checkpoints.
        return {name: layer.weights().factors.on_cpu() for name, layer in self.adapted.items()}


# Only the dropout of adapters is turned on or off; the base stays in evaluation mode.
def train_mode(adapted: dict[str, AdaptedWeight], on: bool) -> None:
    for layer in adapted.values():
        layer.training = on


def rows_of_odd_losses(losses: Tensor, data: StepData, store: TokenStore) -> list[str]:
    """Return the rows of the micro-batches, of all workers, whose loss is not finite.

    All workers must call it together, with the `losses` of the micro-batches of the step.
    """
    own = losses[data.first : data.first + len(data.sequences)].isfinite().tolist()
    rows: list[str] = []
    for finite, group in zip(own, data.sequences, strict=True):
        if not finite:
            for index in group:
                rows += store.origins(index)
    return [*chain.from_iterable(collectives.gather(rows))]


def not_finite(origins: Sequence[str]) -> str:
    """Say that a loss is not finite, and name up to eight of the rows that it comes from."""
    shown = some(origins, 8)
    return (
        f"loss is not finite; it comes from {shown or 'the sum over all workers'}; check these rows"
    )
