"""Inputs of layers at the first supervised tokens of a run, for data-driven methods.

Each input has an owner: the worker that makes the factors of its layers. The workers compute the inputs of different
sequences, and send them to the owners.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from olora_ray.adapter.candidates import Target
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import Waiting, until
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
class Piece:
    """The first `count` supervised tokens of a sequence."""

    sequence: int
    """Index in the store."""
    first: int
    """Position of the first of these tokens among the tokens of all pieces."""
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


def first_tokens(store: TokenStore, limit: int, waiting: Waiting | None = None) -> list[Piece]:
    """Return pieces with the first `limit` supervised tokens of the store, or with all if it has fewer.

    Waits for the shards that it needs; `waiting` is as in StepLoader.
    """
    pieces: list[Piece] = []
    position = sequence = 0
    while position < limit:
        until(store, lambda: store.available > sequence or store.total is not None, waiting)  # noqa: B023  # called now
        if sequence >= store.available:
            break
        count = min(store.supervised([sequence]), limit - position)
        if count:
            pieces.append(Piece(sequence, position, count))
        position, sequence = position + count, sequence + 1
    return pieces


# Sequences spread over the workers: each computes the rows of its sequences, and sends them to their owners.


Item = TypeVar("Item")
AT_ONCE = 2**26
"""Bytes that a worker sends in one exchange."""


def in_parts(items: Iterable[Item], size: Callable[[Item], int], room: int) -> Iterator[list[Item]]:
    part: list[Item] = []
    taken = 0
    for item in items:
        if part and taken + size(item) > room:
            yield part
            part, taken = [], 0
        part.append(item)
        taken += size(item)
    yield part


@dataclass(frozen=True)
class Rows:
    size: int
    """Elements of a row."""
    dtype: torch.dtype
    owner: int
    """Rank of the worker that gets the rows."""

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


class RowExchange(ABC):
    """Exchange of rows: each worker computes rows of several types from sequences, and sends them to their owners.

    `device` is the device over which the workers of the group exchange tensors.
    """

    def __init__(self, types: Sequence[Rows], device: torch.device) -> None:
        self.types, self.device = types, device
        self.sent = 0
        """Bytes sent to other workers."""
        self._here, self._workers = collectives.rank(), collectives.world_size()
        self.own = [
            number for number, rows_type in enumerate(types) if rows_type.owner == self._here
        ]
        """Indices of the types that this worker owns."""

    @abstractmethod
    def count(self, piece: Piece) -> int:
        """Return the number of rows of a sequence."""

    @abstractmethod
    def make(self, piece: Piece) -> list[Tensor]:
        """Return the rows (count x size) of each type for a sequence, on the CPU; may raise UserError."""

    @abstractmethod
    def keep(self, number: int, piece: Piece, rows: Tensor) -> None:
        """Store the rows (count x size) of type `number`, which this worker owns, of a sequence."""

    def run(self, pieces: Sequence[Piece]) -> None:
        """Compute the rows of these sequences and send them to their owners.

        All workers must call it together. A UserError of `make` is raised on all of them.
        """
        told = time.monotonic()
        for turn in range(0, len(pieces), self._workers):
            self._round(pieces[turn : turn + self._workers])
            if time.monotonic() - told > 30:
                told, done = time.monotonic(), min(turn + self._workers, len(pieces))
                logger.info(f"initialisation: {done:,} of {len(pieces):,} sequences processed")

    def _round(self, pieces: Sequence[Piece]) -> None:
        # Every worker runs the model, because the blocks of a sharded base need all workers. A worker without a
        # sequence repeats the last one, and sends nothing.
        rows = collectives.together(lambda: self.make(pieces[min(self._here, len(pieces) - 1)]))
        most = max(map(self.count, pieces))
        for numbers in in_parts(
            range(len(self.types)), lambda number: most * self.types[number].bytes, AT_ONCE
        ):
            self._send(numbers, pieces, rows)

    def _send(
        self, numbers: Sequence[int], pieces: Sequence[Piece], rows: Sequence[Tensor]
    ) -> None:
        sends = self._here < len(pieces)
        outgoing = [
            _as_bytes(
                [rows[number] for number in numbers if sends and self.types[number].owner == worker]
            )
            for worker in range(self._workers)
        ]
        self.sent += sum(len(part) for worker, part in enumerate(outgoing) if worker != self._here)
        mine = [number for number in numbers if self.types[number].owner == self._here]
        width = sum(self.types[number].bytes for number in mine)
        sizes = [width * self.count(piece) for piece in pieces] + [0] * (
            self._workers - len(pieces)
        )
        received = collectives.swap([part.to(self.device) for part in outgoing], sizes)
        for piece, part in zip(pieces, received, strict=False):
            count = self.count(piece)
            lengths = [count * self.types[number].bytes for number in mine]
            for number, flat in zip(mine, part.cpu().split(lengths), strict=True):
                # A copy, because a slice keeps the whole buffer alive and may start at an address that is not a
                # multiple of the element size.
                self.keep(
                    number, piece, flat.clone().view(self.types[number].dtype).view(count, -1)
                )


def _as_bytes(parts: Sequence[Tensor]) -> Tensor:
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *flat])
