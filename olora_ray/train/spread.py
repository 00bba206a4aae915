"""Sequences spread over the workers: each computes rows of its part, and sends them to the workers that own them.

The model runs on one sequence at a time, so that a row has the same bits whoever computes it, and what arrives comes in
the order of the sequences: what an owner makes of it depends on no number of workers.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.train.first_tokens import Piece

logger = logging.getLogger(__name__)

AT_ONCE = 2**26
"""Bytes that a worker sends at once."""
STILL = 30.0
"""Seconds from one line of the log to the next while it lasts."""


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
        """Of one row."""
        return self.size * self.dtype.itemsize


Make = Callable[[Piece], list[Tensor]]
"""A sequence -> its rows (count x size) of each kind, on the CPU. Raises UserError."""
Keep = Callable[[int, Piece, Tensor], None]
"""Takes the rows (count x size) of an own kind, by its number, of a sequence."""


class Spread:
    """Makes rows of all kinds of sequences. All workers must call `run` together."""

    def __init__(
        self, kinds: Sequence[Rows], make: Make, count: Callable[[Piece], int], keep: Keep, device: torch.device
    ) -> None:
        """`count` says how many rows a sequence has; rows travel by `device`."""
        self.kinds, self.make, self.count, self.keep, self.device = kinds, make, count, keep, device
        self.sent = 0
        """Bytes that went to other workers."""
        self._here, self._workers = collectives.rank(), collectives.world_size()

    def own(self) -> list[int]:
        """The kinds that this worker owns, by number."""
        return [number for number, kind in enumerate(self.kinds) if kind.owner == self._here]

    def run(self, pieces: Sequence[Piece]) -> None:
        """Make the rows of these sequences and bring them to their owners; raises what `make` raises, everywhere."""
        told = time.monotonic()
        for turn in range(0, len(pieces), self._workers):
            self._round(pieces[turn : turn + self._workers])
            if time.monotonic() - told > STILL:
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
        for numbers in self._parts(max(map(self.count, pieces))):
            self._send(numbers, pieces, rows)

    def _parts(self, count: int) -> Iterator[list[int]]:
        """The kinds in parts of which so many rows are at most AT_ONCE bytes, or one kind."""
        part: list[int] = []
        size = 0
        for number, kind in enumerate(self.kinds):
            if part and size + count * kind.bytes > AT_ONCE:
                yield part
                part, size = [], 0
            part.append(number)
            size += count * kind.bytes
        yield part

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
            self._receive(mine, piece, part.cpu())

    def _receive(self, numbers: Sequence[int], piece: Piece, received: Tensor) -> None:
        place, count = 0, self.count(piece)
        for number in numbers:
            kind = self.kinds[number]
            # A copy: its memory is its own, and begins where numbers may.
            rows = received[place : place + count * kind.bytes].clone().view(kind.dtype)
            self.keep(number, piece, rows.view(count, kind.size))
            place += count * kind.bytes


def _as_bytes(parts: Sequence[Tensor]) -> Tensor:
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *flat])
