"""The losses of finished trainings on each test row, of their adapters as they were after the last step.

trials/trial-003/rows.json     data, places, tokens, losses
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
"""How far the loss of these rows may be from what the training has measured last: other batches round otherwise."""


@dataclass(frozen=True)
class RowLosses:
    """Losses of one adapter, an entry for each example of the store, in its order."""

    data: str
    """Digest of the store of test rows."""
    places: tuple[str, ...]
    """As file:line, without folders."""
    tokens: tuple[int, ...]
    """Supervised tokens."""
    losses: tuple[float, ...]
    """Summed over these tokens."""

    def mean(self) -> float:
        """Loss per supervised token."""
        return sum(self.losses) / sum(self.tokens)

    def by_group(self, groups: Mapping[str, Sequence[int]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(losses, tokens), each (groups,), summed over the examples of a group; `groups` by file and line."""
        there = np.unique(group_numbers(self.places, groups), return_inverse=True)[1]
        columns = (np.asarray(each, dtype=np.float64) for each in (self.losses, self.tokens))
        losses, tokens = (np.bincount(there, column).astype(np.float64) for column in columns)
        return losses, tokens

    def counts(self, groups: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """(rows, groups of them) that it is of: what is too long has no tokens, and so no loss."""
        return len(set(self.places)), len(set(group_numbers(self.places, groups)))

    @classmethod
    def read(cls, folder: str, data: str) -> "RowLosses | None":
        """What was measured of the trial in a folder on this store; None if there is nothing, or it is damaged."""
        try:
            tree = json.loads(storage.read_text(storage.join(folder, FILE)))
            places, tokens = tuple(map(str, tree["places"])), tuple(map(int, tree["tokens"]))
            found = cls(str(tree["data"]), places, tokens, tuple(map(float, tree["losses"])))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None
        whole = len(found.places) == len(found.tokens) == len(found.losses)
        return found if whole and found.data == data else None


def places_of(store: TokenStore) -> tuple[str, ...]:
    """Place of each example of a store, as file:line without folders."""
    return tuple(place.rpartition("/")[2] for number in range(len(store)) for place in store.origins(number))


def group_numbers(places: Sequence[str], groups: Mapping[str, Sequence[int]]) -> list[int]:
    """The group of each place; `groups` by file and line."""
    return [groups[name][int(line) - 1] for name, _, line in (place.rpartition(":") for place in places)]


def measure(trials: Sequence[tuple[str, TrainSpec]]) -> None:
    """Measure the trials in these folders, all on one copy of the base model, in this process.

    Needs the memory of one worker. Raises UserError for a trial whose last checkpoint is lost.
    """
    quiet_transformers()
    spec = trials[0][1]
    if spec.config.cluster.strategy == "fsdp":  # a base that is spread over several GPUs need not fit on one
        spec, device = on_cpu(spec), torch.device("cpu")
    else:
        device = assigned_device()
    shared = SharedBase.of(spec, device)
    assert spec.eval is not None
    packs = [spec.eval[number] for number in range(min(TRIED, len(spec.eval)))]
    attention = choose_attention(shared.loss, packs, spec.config, shared.device).attention
    for folder, each in trials:
        found = of_trial(shared, each, folder, attention)
        storage.write_text(storage.join(folder, FILE), json.dumps(asdict(found)))


def of_trial(shared: SharedBase, spec: TrainSpec, folder: str, attention: str) -> RowLosses:
    """The losses of one trial's last adapter, and of no earlier one."""
    place = storage.join(folder, "checkpoints")
    newest = checkpoints.latest_good(place)
    if newest is None or newest[1].state.step < total_steps(spec.config.train, len(spec.train)):
        raise UserError(f"{place}: the last checkpoint is lost; delete {folder} and run the same command again")
    found = newest[1]
    if shared.dtype not in (None, began := found.state.precision) and began is not None:
        logger.warning(
            f"{folder}: trained in {began}, and measured in {shared.dtype}, which model.dtype: auto means on this node;"
            " differences of methods may be differences of nodes: use nodes of one kind, or set it"
        )
    checkpoint.require_same(found.identity, spec.identity(), newest[0])
    model: Any = shared.loss.model
    factors = {name: weights.factors for name, weights in found.adapter.items()}
    adapted = wrap(model, factors, spec.config.adapter.scale())
    trainer = Trainer(shared.loss, adapted, spec.config, shared.device)
    trainer.flat.load(trainer.flat.vector, named(found.adapter))
    train_mode(adapted, False)
    install(model, adapted)
    try:
        assert spec.eval is not None
        losses = losses_of(trainer, spec.eval, attention)
    finally:
        remove(model)
    _compare(losses, found.state.history, folder)
    return losses


@torch.no_grad()
def losses_of(trainer: Trainer, store: TokenStore, attention: str) -> RowLosses:
    """The loss of each example of a store, with the adapters that are installed."""
    width, losses, tokens = trainer.config.train.micro_batch, list[float](), list[int]()
    for start in range(0, len(store), width):
        packs = [store[number] for number in range(start, min(start + width, len(store)))]
        sizes = [size for pack in packs for size in _supervised(pack)]
        each = trainer.loss.each(collate(packs, attention).to(trainer.device)).double().cpu()
        losses += [float(part.sum()) for part in each.split(sizes)]
        tokens += sizes
    return RowLosses(store.digest, places_of(store), tuple(tokens), tuple(losses))


def _supervised(pack: Pack) -> list[int]:
    """Number of supervised tokens of each example of a sequence."""
    borders = np.cumsum([0, *pack.segments])
    return [int(pack.supervised[start:stop].sum()) for start, stop in itertools.pairwise(borders)]


def _compare(found: RowLosses, history: Sequence[Mapping[str, float]], folder: str) -> None:
    """Say so if these rows add up to another loss than the training has measured of the same adapter."""
    last = next((row["eval/loss"] for row in reversed(history) if "eval/loss" in row), None)
    if last is not None and abs(found.mean() - last) > ROUNDING * max(1.0, abs(last)):
        logger.warning(f"{folder}: its rows have the loss {found.mean():.4f}, but its training has measured {last:.4f}")
