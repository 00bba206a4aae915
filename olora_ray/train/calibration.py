"""Inputs of layers at a run's first supervised tokens, for data-driven methods, brought to their owners."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from olora_ray.adapter.candidates import Target
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.collate import Batch
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import Waiting, until
from olora_ray.train.loss import SupervisedLoss

logger = logging.getLogger(__name__)

# The inputs of layers as the model runs: which layers have one in common, and its rows at chosen tokens.


See = Callable[[str, Tensor, Tensor], None]
"""Takes the name of a layer, its input and its output."""


@dataclass(frozen=True)
class LayerInput:
    """One input, with a row for each token, and the layers that it goes to (q, k and v; gate and up)."""

    layers: tuple[str, ...]
    size: int
    """n."""
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name of the first layer."""
        return self.layers[0]


@torch.no_grad()
def inputs_of(loss: SupervisedLoss, targets: Mapping[str, Target], probe: Batch) -> list[LayerInput]:
    """The inputs of all targets, in the order of their first layers, found by running the model on a few tokens.

    Raises UserError for a layer that does not see each token once, as an expert of a mixture. All workers of a sharded
    base must call it together; `probe` is the same everywhere.
    """
    kept: dict[str, Tensor] = {}  # alive till the end, so that no two have the same memory

    def see(name: str, x: Tensor, _: Tensor) -> None:
        if name in kept:
            raise UserError(_refusal(name, "is used several times for a token"))
        kept[name] = x

    with watched({name: target.module for name, target in targets.items()}, see):
        loss(probe)
    groups: dict[Any, list[str]] = {}
    for name in targets:
        if name not in kept:
            raise UserError(_refusal(name, "is not used for text"))
        _check_rows(name, kept[name], probe)
        x = kept[name]
        groups.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype), []).append(name)
    return [LayerInput(tuple(names), kept[names[0]].shape[-1], kept[names[0]].dtype) for names in groups.values()]


@torch.no_grad()
def rows_of(
    loss: SupervisedLoss, targets: Mapping[str, Target], inputs: Sequence[LayerInput], batch: Batch, places: Tensor
) -> list[Tensor]:
    """The rows (tokens x n) of each input at flat places (int64) of the batch, on the CPU.

    Raises UserError for a layer that does not see each token, or sees numbers that are not finite, once the model has
    run: of a sharded one the other workers need this one for all of its layers.
    """
    found: dict[str, Tensor] = {}
    problems: list[UserError] = []

    def see(name: str, x: Tensor, _: Tensor) -> None:
        try:
            _check_rows(name, x, batch)
            rows = x.reshape(-1, x.shape[-1])[places]
            if not torch.isfinite(rows).all():
                raise UserError(f"model.name: the input of {name} has NaN or infinite values on the training data")
            found[name] = rows.cpu()
        except UserError as error:
            problems.append(error)

    with watched({each.name: targets[each.name].module for each in inputs}, see):
        loss(batch)
    if problems:
        raise problems[0]
    return [found[each.name] for each in inputs]


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Have `see` called each time that one of these modules has run."""
    handles = [
        module.register_forward_hook(partial(_hand_over, name, see), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_over(
    name: str, see: See, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
) -> None:
    see(name, inputs[0] if inputs else next(iter(named.values())), output)


def _check_rows(name: str, x: Tensor, batch: Batch) -> None:
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, Tensor)
    if x.numel() != ids.numel() * x.shape[-1]:
        raise UserError(_refusal(name, "does not see every token"))


def _refusal(name: str, why: str) -> str:
    return (
        f"adapter.method: it needs the input of {name} at each token, and that layer {why}; leave it out of"
        " adapter.targets, or use another method"
    )


# The first supervised tokens of a run's order.


@dataclass(frozen=True)
class Piece:
    """A sequence with the supervised tokens of it that are wanted: its first `count`."""

    sequence: int
    """Its number in the store."""
    first: int
    """The place of the first of them among all that are wanted."""
    count: int

    @property
    def end(self) -> int:
        """The place after the last of them."""
        return self.first + self.count


def first_tokens(store: TokenStore, limit: int, waiting: Waiting | None = None) -> list[Piece]:
    """The sequences that have the first `limit` supervised tokens of the store, or all if it has fewer.

    Waits for the shards that it needs; `waiting` as of StepLoader.
    """
    found: list[Piece] = []
    place = sequence = 0
    while place < limit:
        until(store, lambda: store.available > sequence or store.total is not None, waiting)  # noqa: B023  # called now
        if sequence >= store.available:
            break
        count = min(store.supervised([sequence]), limit - place)
        if count:
            found.append(Piece(sequence, place, count))
        place, sequence = place + count, sequence + 1
    return found


# Sequences spread over the workers: each computes rows of its part, and sends them to the workers that own them.


Item = TypeVar("Item")
AT_ONCE = 2**26
"""Bytes that a worker sends at once."""


def in_parts(items: Iterable[Item], size: Callable[[Item], int], room: int) -> Iterator[list[Item]]:
    """The items in parts of at most `room` bytes, or of one item."""
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
    """A kind of rows: those of one input, for example."""

    size: int
    """Numbers of a row."""
    dtype: torch.dtype
    owner: int
    """The worker that they go to."""

    @property
    def bytes(self) -> int:
        """Bytes of one row."""
        return self.size * self.dtype.itemsize


class RowExchange(ABC):
    """Makes rows of all kinds of sequences, and brings them to their owners by `device`."""

    def __init__(self, kinds: Sequence[Rows], device: torch.device) -> None:
        self.kinds, self.device = kinds, device
        self.sent = 0
        """Bytes that went to other workers."""
        self._here, self._workers = collectives.rank(), collectives.world_size()
        self.own = [number for number, kind in enumerate(kinds) if kind.owner == self._here]
        """The kinds that this worker owns, by number."""

    @abstractmethod
    def count(self, piece: Piece) -> int:
        """Return the number of rows of a sequence."""

    @abstractmethod
    def make(self, piece: Piece) -> list[Tensor]:
        """The rows (count x size) of each kind of a sequence, on the CPU; raises UserError."""

    @abstractmethod
    def keep(self, number: int, piece: Piece, rows: Tensor) -> None:
        """Take the rows (count x size) of an own kind, by its number, of a sequence."""

    def run(self, pieces: Sequence[Piece]) -> None:
        """Make the rows of these sequences and bring them to their owners; raises what `make` raises, everywhere.

        All workers must call it together.
        """
        told = time.monotonic()
        for turn in range(0, len(pieces), self._workers):
            self._round(pieces[turn : turn + self._workers])
            if time.monotonic() - told > 30:
                told, done = time.monotonic(), min(turn + self._workers, len(pieces))
                logger.info(f"initialisation: {done:,} of {len(pieces):,} sequences looked at")

    def _round(self, pieces: Sequence[Piece]) -> None:
        """One sequence for each worker, as far as there are some."""
        problem, rows = None, []
        try:
            # Every worker runs the model, since those of a sharded base have to; one too many repeats another's.
            rows = self.make(pieces[min(self._here, len(pieces) - 1)])
        except UserError as error:
            problem = str(error)
        collectives.raise_together(problem)
        most = max(map(self.count, pieces))
        for numbers in in_parts(range(len(self.kinds)), lambda number: most * self.kinds[number].bytes, AT_ONCE):
            self._send(numbers, pieces, rows)

    def _send(self, numbers: Sequence[int], pieces: Sequence[Piece], rows: Sequence[Tensor]) -> None:
        """Send the rows of some kinds to their owners, and keep what comes from the others."""
        sends = self._here < len(pieces)
        outgoing = [
            _as_bytes([rows[number] for number in numbers if sends and self.kinds[number].owner == worker])
            for worker in range(self._workers)
        ]
        self.sent += sum(len(part) for worker, part in enumerate(outgoing) if worker != self._here)
        mine = [number for number in numbers if self.kinds[number].owner == self._here]
        width = sum(self.kinds[number].bytes for number in mine)
        sizes = [width * self.count(piece) for piece in pieces] + [0] * (self._workers - len(pieces))
        received = collectives.swap([part.to(self.device) for part in outgoing], sizes)
        for piece, part in zip(pieces, received, strict=False):
            count = self.count(piece)
            lengths = [count * self.kinds[number].bytes for number in mine]
            for number, flat in zip(mine, part.cpu().split(lengths), strict=True):
                # A copy: its memory is its own, and begins where numbers may.
                self.keep(number, piece, flat.clone().view(self.kinds[number].dtype).view(count, -1))


def _as_bytes(parts: Sequence[Tensor]) -> Tensor:
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *flat])
