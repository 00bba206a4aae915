"""Inputs of layers at the first supervised tokens of a run, for data-driven methods.

Each input has an owner: the worker that makes the factors of its layers. The workers compute the inputs of different
sequences, and send them to the owners.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olora_ray.adapter.candidates import Target
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loss import SupervisedLoss, watched

logger = logging.getLogger(__name__)

# The inputs of layers while the model runs: the layers that share an input, and its rows at chosen tokens.


# An input with a row for each token, and the layers that share it (q, k and v; gate and up).
@dataclass(frozen=True)
class LayerInput:
    layers: tuple[str, ...]
    size: int
    """Features of a row, n."""
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.layers[0]

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return self.size * self.dtype.itemsize


@torch.no_grad()
def inputs_of(
    loss: SupervisedLoss, targets: Mapping[str, Target], probe: Batch
) -> list[LayerInput]:
    """Run the model on a few tokens, and return the inputs of all targets in the order of their first layers.

    Raises UserError for a layer that does not see each token once, such as an expert of a mixture. All workers of a
    sharded base must call it together, with the same `probe`.
    """
    # Layers share an input if the memory is the same. All inputs are kept alive until they are compared; otherwise
    # torch would use the memory of one input for a later one.
    kept: dict[str, Tensor] = {}

    def see(name: str, x: Tensor, _: Tensor) -> None:
        if name in kept:
            raise UserError(_refusal(name, "runs several times per token"))
        kept[name] = x

    with watched({name: target.module for name, target in targets.items()}, see):
        loss(probe)
    groups: dict[Any, list[str]] = {}
    for name in targets:
        if name not in kept:
            raise UserError(_refusal(name, "does not run on text"))
        _check_rows(name, kept[name], probe)
        x = kept[name]
        groups.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype), []).append(name)
    return [
        LayerInput(tuple(names), kept[names[0]].shape[-1], kept[names[0]].dtype)
        for names in groups.values()
    ]


@torch.no_grad()
def rows_of(
    loss: SupervisedLoss,
    targets: Mapping[str, Target],
    inputs: Sequence[LayerInput],
    batch: Batch,
    positions: Tensor,
) -> list[Tensor]:
    """Return the rows (tokens x n) of each input at flat positions (int64) of the batch, on the CPU.

    Raises UserError for a layer that does not see each token, or whose input is not finite.
    """
    kept: dict[str, Tensor] = {}
    problems: list[UserError] = []

    def see(name: str, x: Tensor, _: Tensor) -> None:
        try:
            _check_rows(name, x, batch)
            rows = x.reshape(-1, x.shape[-1])[positions]
            if not torch.isfinite(rows).all():
                raise UserError(
                    f"model.name: the input of {name} has NaN or infinite values on the training data"
                )
            kept[name] = rows.cpu()
        except UserError as error:
            problems.append(error)

    # Errors are raised after the model has run: with a sharded base all workers must run all of its blocks together.
    with watched({each.name: targets[each.name].module for each in inputs}, see):
        loss(batch)
    if problems:
        raise problems[0]
    return [kept[each.name] for each in inputs]


def _check_rows(name: str, x: Tensor, batch: Batch) -> None:
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, Tensor)
    if x.numel() != ids.numel() * x.shape[-1]:
        raise UserError(_refusal(name, "does not see every token"))


def _refusal(name: str, why: str) -> str:
    return (
        f"adapter.method: needs the input of {name} at each token, but that layer {why}; leave it out of"
        " adapter.targets, or use another method"
    )


# The first supervised tokens, in the order of the store.


@dataclass(frozen=True)
class RowPart:
    """The first `count` supervised tokens of a sequence."""

    sequence: int
    """Index in the store."""
    first: int
    """Position of the first of these tokens among the tokens of all pieces."""
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


def first_tokens(store: TokenStore, limit: int) -> list[RowPart]:
    """Return pieces with the first `limit` supervised tokens of the store, or with all if it has fewer.

    Waits for the shards that it needs.
    """
    pieces: list[RowPart] = []
    position = sequence = 0
    while position < limit:
        if sequence >= store.wait(sequence + 1):
            break
        count = min(store.counts([sequence]).supervised, limit - position)
        if count:
            pieces.append(RowPart(sequence, position, count))
        position += count
        sequence += 1
    return pieces


# Sequences spread over the workers: each computes the rows of its sequences, and sends them to their owners.


AT_ONCE = 2**26
"""Bytes that a worker sends in one exchange."""


class Activations:
    """The rows of each input at the first supervised tokens, kept by the worker that owns the input.

    `owners` has a rank for each input. `device` is the device over which the workers exchange tensors.
    """

    def __init__(
        self,
        loss: SupervisedLoss,
        targets: Mapping[str, Target],
        inputs: Sequence[LayerInput],
        owners: Sequence[int],
        store: TokenStore,
        device: torch.device,
    ) -> None:
        self.loss = loss
        self.targets = targets
        self.inputs = inputs
        self.owners = owners
        self.store = store
        self.device = device
        self.sent = 0
        """Bytes sent to other workers."""
        self._here = collectives.rank()
        self._workers = collectives.world_size()
        self.own = [number for number, owner in enumerate(owners) if owner == self._here]
        """Indices of the inputs that this worker owns."""
        self._rows: dict[int, dict[int, Tensor]] = {number: {} for number in self.own}

    def rows(self, number: int, count: int) -> Tensor:
        """Return the first `count` rows of an own input."""
        pieces = self._rows[number]
        return torch.cat([pieces[first] for first in sorted(pieces)])[:count]

    def held(self) -> int:
        """Return the bytes of all rows that this worker keeps."""
        return sum(part.nbytes for pieces in self._rows.values() for part in pieces.values())

    def run(self, pieces: Sequence[RowPart]) -> None:
        """Compute the rows of these sequences and send them to their owners.

        All workers must call it together. A UserError of one worker is raised on all of them.
        """
        told = time.monotonic()
        for turn in range(0, len(pieces), self._workers):
            self._round(pieces[turn : turn + self._workers])
            if time.monotonic() - told > 30:
                told = time.monotonic()
                done = min(turn + self._workers, len(pieces))
                logger.info(f"initialisation: {done:,} of {len(pieces):,} sequences processed")

    def _round(self, pieces: Sequence[RowPart]) -> None:
        # Every worker runs the model, because the blocks of a sharded base need all workers. A worker without a
        # sequence repeats the last one, and sends nothing.
        rows = collectives.together(lambda: self._make(pieces[min(self._here, len(pieces) - 1)]))
        most = max(piece.count for piece in pieces)
        part: list[int] = []
        size = 0
        for number, each in enumerate(self.inputs):
            if part and size + most * each.bytes > AT_ONCE:
                self._send(part, pieces, rows)
                part = []
                size = 0
            part.append(number)
            size += most * each.bytes
        self._send(part, pieces, rows)

    def _make(self, piece: RowPart) -> list[Tensor]:
        model: Any = self.loss.model
        batch = collate([self.store[piece.sequence]], model.config._attn_implementation)
        # As in PEFT's label mask: the positions of the supervised tokens themselves, not those that predict them.
        positions = batch.predicts[: piece.count] + 1
        return rows_of(
            self.loss, self.targets, self.inputs, batch.to(self.device), positions.to(self.device)
        )

    def _send(
        self, numbers: Sequence[int], pieces: Sequence[RowPart], rows: Sequence[Tensor]
    ) -> None:
        sends = self._here < len(pieces)
        outgoing = []
        for worker in range(self._workers):
            flat = [torch.empty(0, dtype=torch.uint8)]
            for number in numbers:
                if sends and self.owners[number] == worker:
                    flat.append(rows[number].contiguous().view(-1).view(torch.uint8))
            outgoing.append(torch.cat(flat))
        self.sent += sum(len(part) for worker, part in enumerate(outgoing) if worker != self._here)
        mine = [number for number in numbers if self.owners[number] == self._here]
        width = sum(self.inputs[number].bytes for number in mine)
        sizes = [width * piece.count for piece in pieces] + [0] * (self._workers - len(pieces))
        received = collectives.swap([part.to(self.device) for part in outgoing], sizes)
        for piece, part in zip(pieces, received, strict=False):
            lengths = [piece.count * self.inputs[number].bytes for number in mine]
            for number, received_rows in zip(mine, part.cpu().split(lengths), strict=True):
                # A copy, because a slice keeps the whole buffer alive and may start at an address that is not a
                # multiple of the element size.
                own = received_rows.clone().view(self.inputs[number].dtype)
                self._rows[number][piece.first] = own.view(piece.count, -1)
