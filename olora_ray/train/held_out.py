"""The losses of a model on held-out sequences."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Counts, Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import tree
from olora_ray.train.loop import Trainer, not_finite
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.objectives.objective import Objective


class Packs(Protocol):
    """A list of sequences, or a complete token store."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Pack: ...


@dataclass(frozen=True)
class HeldOut:
    numbers: Tensor
    """Sums over each group of sequences, or each example: float64 on the CPU, (groups or examples, 1 + more)."""
    whole: Counts
    """Size of all sequences."""
    means: dict[str, float]
    """The objective's means by name; the first is what a training makes small."""

    @property
    def loss(self) -> float:
        return next(iter(self.means.values()))

    def losses(self) -> list[float]:
        """Return the summed loss of each group, or of each example."""
        losses: list[float] = self.numbers[:, 0].tolist()
        return losses


@torch.no_grad()
def held_out(
    loss: SupervisedLoss,
    packs: Packs,
    objective: Objective,
    attention: str,
    width: int,
    each: bool = False,
) -> HeldOut:
    """Return the objective's numbers for each group of `width` sequences, or with `each` for each example.

    All workers must call it together, and get the same. They share the groups. Neither the groups nor the order of a
    sum depend on the number of workers.
    """
    sizes = [packs[index].examples() for index in range(len(packs))]
    whole = sum(chain.from_iterable(sizes), Counts())
    groups = [range(first, min(first + width, len(packs))) for first in range(0, len(packs), width)]
    lengths = [1] * len(groups)
    if each:
        lengths = [len([*chain.from_iterable(sizes[group.start : group.stop])]) for group in groups]
    ends = [*accumulate(lengths)]
    # With a sharded base all workers must run the model equally often, so a worker with fewer groups repeats group 0.
    worker = collectives.rank()
    workers = collectives.world_size()
    rounds = len(groups[worker::workers])
    if loss.sharded:
        rounds = math.ceil(len(groups) / workers)

    device = next(loss.parameters()).device
    numbers = torch.zeros(ends[-1], objective.numbers, dtype=torch.float64, device=device)
    for turn in range(rounds):
        number = worker + turn * workers
        group = groups[number] if number < len(groups) else groups[0]
        batch = collate([packs[index] for index in group], attention).to(device)
        found = objective.each(loss, batch, whole) if each else objective.loss(loss, batch, whole)
        if number < len(groups):
            numbers[ends[number] - lengths[number] : ends[number]] = found
    collectives.sum_in_place(numbers)
    numbers = numbers.cpu()
    weight = objective.weight(whole)
    means = (tree.total(numbers) / weight).tolist()
    if each:  # one after the other, so that the last bits stay those of searches of older versions
        means = [sum(column) / weight for column in numbers.T.tolist()]
    return HeldOut(numbers, whole, objective.named(means, whole))


def by_source(store: TokenStore, names: Sequence[str]) -> dict[str, tuple[list[int], Counts]]:
    """Return the numbers of each source's examples, and their size; `names` has the source of each file."""
    source_of = dict(zip(store.files, names, strict=True))
    every = range(len(store))
    origins = chain.from_iterable(store.origins(index) for index in every)
    sizes = chain.from_iterable(store[index].examples() for index in every)
    rows: dict[str, list[int]] = defaultdict(list)
    wholes: dict[str, Counts] = defaultdict(Counts)
    for number, (origin, size) in enumerate(zip(origins, sizes, strict=True)):
        source = source_of[origin.rpartition(":")[0]]
        rows[source].append(number)
        wholes[source] += size
    return {source: (rows[source], wholes[source]) for source in rows}


def evaluate(
    trainer: Trainer, store: TokenStore, attention: str, step: int = 0, each: bool = False
) -> HeldOut:
    """Measure the adapter of a training on a store; all workers must call it together.

    `step` is the number of steps done, for messages. Raises UserError on all workers, with the step and the source
    rows, if the loss is not finite.
    """
    width = trainer.config.train.micro_batch
    found = held_out(trainer.loss, store, trainer.objective, attention, width, each)
    if math.isfinite(found.loss):
        return found
    origins = [store.origins(index) for index in range(len(store))]
    units = [[origin] for origin in chain.from_iterable(origins)]
    if not each:
        units = [
            [*chain.from_iterable(origins[first : first + width])]
            for first in range(0, len(origins), width)
        ]
    bad = []
    for unit, loss in zip(units, found.losses(), strict=True):
        if not math.isfinite(loss):
            bad += unit
    problem = f"step {step}: the held-out {not_finite(bad)}"
    if step:  # before the first step another learning rate would change nothing
        problem += ", or lower train.lr"
    raise UserError(problem)
