"""The losses of finished trainings on each test row, for the adapter after the last step.

trials/lora-x1-seed18/rows.json     data, places, tokens, losses, trainable
"""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from olora_ray.adapter.inject import install, remove, wrap
from olora_ray.cluster.resume import named
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import SharedBase, assigned_device, on_cpu
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.logs import quiet_transformers
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.loader import total_steps
from olora_ray.train.loop import Trainer, train_mode
from olora_ray.train.self_test import choose_attention

logger = logging.getLogger("olora_ray.comparison")

FILE = "rows.json"
TRIED = 8
"""Sequences from which the self-test takes its examples."""
ROUNDING = 0.02
"""Relative difference to the training's last loss that is still rounding: the batches differ."""


@dataclass(frozen=True)
class RowLosses:
    """Losses of one adapter: one entry for each example of the store, in its order."""

    data: str
    """Digest of the token store of the test rows."""
    places: tuple[str, ...]
    """file:line of each example, without folders."""
    tokens: tuple[int, ...]
    """Supervised tokens of each example."""
    losses: tuple[float, ...]
    """Losses, each summed over these tokens."""
    trainable: int
    """Number of trained parameters of the adapter."""

    def mean(self) -> float:
        return sum(self.losses) / sum(self.tokens)

    def by_group(self, groups: Mapping[str, Sequence[int]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (losses, tokens), each (groups,), summed over the examples of a group; `groups` by file and line."""
        # Numbers of groups may have gaps where a group's rows were too long, so they are renumbered.
        numbers = np.unique(group_numbers(self.places, groups), return_inverse=True)[1]
        losses, tokens = (np.bincount(numbers, each).astype(np.float64) for each in (self.losses, self.tokens))
        return losses, tokens

    def counts(self, groups: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """Return (rows, groups) that have losses: a row that is too long has no tokens."""
        return len(set(self.places)), len(set(group_numbers(self.places, groups)))

    @classmethod
    def read(cls, folder: str, data: str) -> "RowLosses | None":
        """Return the losses of a trial's folder on this store; None if they are missing or damaged."""
        try:
            losses = TypeAdapter(cls).validate_json(storage.read_text(storage.join(folder, FILE)))
        except (OSError, ValueError):
            return None
        complete = len(losses.places) == len(losses.tokens) == len(losses.losses)
        return losses if complete and losses.data == data else None


def places_of(store: TokenStore | None) -> tuple[str, ...]:
    assert store is not None
    return tuple(place.rpartition("/")[2] for number in range(len(store)) for place in store.origins(number))


def group_numbers(places: Sequence[str], groups: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the group of each place; `groups` by file and line."""
    return [groups[name][int(line) - 1] for name, _, line in (place.rpartition(":") for place in places)]


def measure(trials: Sequence[tuple[str, TrainSpec]]) -> None:
    """Measure the trials in these folders, all on one copy of the base model, in this process.

    Needs the memory of one worker. Raises UserError if a trial's last checkpoint is lost.
    """
    quiet_transformers()
    # All trials have the same base model and test rows, so the first one's specification serves for all.
    spec = trials[0][1]
    # A base model that is sharded over several GPUs need not fit on one of them.
    sharded = spec.config.cluster.strategy == "fsdp"
    spec, device = (on_cpu(spec), torch.device("cpu")) if sharded else (spec, assigned_device())
    shared = SharedBase.of(spec, device)
    assert spec.eval is not None
    packs = [spec.eval[number] for number in range(min(TRIED, len(spec.eval)))]
    attention = choose_attention(shared.loss, packs, spec.config, shared.device).attention
    for folder, each in trials:
        losses = of_trial(shared, each, folder, attention)
        storage.write_text(storage.join(folder, FILE), json.dumps(asdict(losses)))


def of_trial(shared: SharedBase, spec: TrainSpec, folder: str, attention: str) -> RowLosses:
    newest = checkpoints.latest_good(storage.join(folder, "checkpoints"))
    # An older checkpoint would make this arm's loss higher than it is.
    if newest is None or newest[1].state.step < total_steps(spec.config.train, len(spec.train)):
        raise UserError(f"{folder}: the last checkpoint is lost; delete {folder} and run the same command again")
    last = newest[1]
    if shared.dtype not in (None, began := last.state.precision) and began is not None:
        logger.warning(
            f"{folder}: trained in {began}, but measured in {shared.dtype}, because model.dtype is auto; differences"
            " between arms may be differences between nodes: set model.dtype, or use equal nodes"
        )
    checkpoint.require_same(last.identity, spec.identity(), newest[0])
    model: Any = shared.loss.model
    factors = {name: weights.factors for name, weights in last.adapter.items()}
    adapted = wrap(model, factors, spec.config.adapter.scale())
    trainer = Trainer(shared.loss, adapted, spec.config, shared.device)
    trainer.flat.load(trainer.flat.vector, named(last.adapter))
    train_mode(adapted, False)
    install(model, adapted)
    try:
        assert spec.eval is not None
        losses = losses_of(trainer, spec.eval, attention)
    finally:
        remove(model)
    _compare(losses, last.state.history, folder)
    return losses


@torch.no_grad()
def losses_of(trainer: Trainer, store: TokenStore, attention: str) -> RowLosses:
    width, losses, tokens = trainer.config.train.micro_batch, list[float](), list[int]()
    for start in range(0, len(store), width):
        packs = [store[number] for number in range(start, min(start + width, len(store)))]
        sizes = [size for pack in packs for size in _supervised(pack)]
        each = trainer.loss.each(collate(packs, attention).to(trainer.device)).double().cpu()
        losses += [float(part.sum()) for part in each.split(sizes)]
        tokens += sizes
    return RowLosses(store.digest, places_of(store), tuple(tokens), tuple(losses), trainer.flat.vector.numel())


def _supervised(pack: Pack) -> list[int]:
    borders = np.cumsum([0, *pack.segments])
    return [int(pack.supervised[start:stop].sum()) for start, stop in itertools.pairwise(borders)]


def _compare(losses: RowLosses, history: Sequence[Mapping[str, float]], folder: str) -> None:
    # Both are losses of the same adapter on the same rows, so a larger difference is a sign of an error.
    last = next((row["eval/loss"] for row in reversed(history) if "eval/loss" in row), None)
    if last is not None and abs(losses.mean() - last) > ROUNDING * max(1.0, abs(last)):
        logger.warning(f"{folder}: its rows have the loss {losses.mean():.4f}, but its training measured {last:.4f}")
