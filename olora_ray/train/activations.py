"""Activations of a whole training at its first supervised tokens, spread over the workers.

Each worker runs the model on its part of the sequences, one at a time, so that a row has the same bits whoever computes
it, and sends each input's rows once to the worker that owns the input. That one holds them in the order of the tokens.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from olora_ray.adapter.targets import Target
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import TokenStore
from olora_ray.train.first_tokens import Piece
from olora_ray.train.layer_inputs import LayerInput, rows_of
from olora_ray.train.loss import SupervisedLoss

AT_ONCE = 2**26
"""Bytes that a worker sends at once."""


class Activations:
    """The rows of the inputs that this worker owns. All workers must call `run` together."""

    def __init__(
        self,
        loss: SupervisedLoss,
        targets: Mapping[str, Target],
        inputs: Sequence[LayerInput],
        owners: Sequence[int],
        store: TokenStore,
        device: torch.device,
    ) -> None:
        """`owners` has the worker of each input."""
        self.loss, self.targets, self.inputs, self.owners = loss, targets, inputs, owners
        self.store, self.device = store, device
        self.sent = 0
        """Bytes that went to other workers."""
        self._here, self._workers = collectives.rank(), collectives.world_size()
        self._rows: dict[int, dict[int, Tensor]] = {number: {} for number in self.own()}

    def own(self) -> list[int]:
        """The inputs that this worker owns, by number."""
        return [number for number, owner in enumerate(self.owners) if owner == self._here]

    def rows(self, number: int, count: int) -> Tensor:
        """The first `count` rows of an own input (count x n), as the model has computed them."""
        pieces = self._rows[number]
        return torch.cat([pieces[first] for first in sorted(pieces)])[:count]

    def held(self) -> int:
        """Bytes of all rows that lie here."""
        return sum(part.nbytes for pieces in self._rows.values() for part in pieces.values())

    def run(self, pieces: Sequence[Piece]) -> None:
        """Run the model on these sequences; raises UserError as `rows_of`."""
        for turn in range(0, len(pieces), self._workers):
            self._round(pieces[turn : turn + self._workers])

    def _round(self, pieces: Sequence[Piece]) -> None:
        """One sequence for each worker, as far as there are some."""
        problem, rows = None, []
        try:
            rows = self._forward(pieces[min(self._here, len(pieces) - 1)])
        except UserError as error:
            problem = str(error)
        collectives.raise_together(problem)
        for numbers in self._parts(max(piece.count for piece in pieces)):
            self._send(numbers, pieces, rows)

    def _forward(self, piece: Piece) -> list[Tensor]:
        """Every worker runs the model, since those of a sharded base have to; one too many repeats another's."""
        pack = self.store[piece.sequence]
        attention = self.loss.model.config._attn_implementation  # type: ignore[union-attr]
        batch = collate([pack], str(attention))
        # The tokens that are supervised themselves, as PEFT's label mask has it, not those that predict them.
        places = batch.predicts[: piece.count] + 1
        return rows_of(self.loss, self.targets, self.inputs, batch.to(self.device), places.to(self.device))

    def _parts(self, count: int) -> Iterator[list[int]]:
        """The inputs in parts of which so many rows are at most AT_ONCE bytes, or one input."""
        part: list[int] = []
        size = 0
        for number, each in enumerate(self.inputs):
            if part and size + count * each.row_bytes > AT_ONCE:
                yield part
                part, size = [], 0
            part.append(number)
            size += count * each.row_bytes
        yield part

    def _send(self, numbers: Sequence[int], pieces: Sequence[Piece], rows: Sequence[Tensor]) -> None:
        """Send the rows of some inputs to their owners, and keep what comes from the others."""
        sends = self._here < len(pieces)
        outgoing = [
            _as_bytes([rows[number] for number in numbers if sends and self.owners[number] == worker]).to(self.device)
            for worker in range(self._workers)
        ]
        mine = [number for number in numbers if self.owners[number] == self._here]
        width = sum(self.inputs[number].row_bytes for number in mine)
        counts = [piece.count for piece in pieces] + [0] * (self._workers - len(pieces))
        self.sent += sum(len(part) for worker, part in enumerate(outgoing) if worker != self._here)
        for piece, part in zip(pieces, collectives.swap(outgoing, [width * count for count in counts]), strict=False):
            self._keep(mine, piece, part.cpu())

    def _keep(self, numbers: Sequence[int], piece: Piece, received: Tensor) -> None:
        place = 0
        for number in numbers:
            each = self.inputs[number]
            size = piece.count * each.row_bytes
            # A copy: its memory is its own, and begins where numbers may.
            rows = received[place : place + size].clone().view(each.dtype)
            self._rows[number][piece.first] = rows.view(piece.count, each.size)
            place += size


def _as_bytes(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [torch.empty(0, dtype=torch.uint8), *(part.contiguous().view(-1).view(torch.uint8) for part in parts)]
    )
