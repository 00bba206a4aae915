"""Activations of a whole training at its first supervised tokens, each input's on the worker that owns it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from olora_ray.adapter.targets import Target
from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import TokenStore
from olora_ray.train.first_tokens import Piece
from olora_ray.train.layer_inputs import LayerInput, rows_of
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.spread import Rows, Spread


class Activations:
    """The rows of the inputs that this worker owns, in the order of the tokens."""

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
        self.loss, self.targets, self.inputs = loss, targets, inputs
        self.store, self.device = store, device
        kinds = [Rows(each.size, each.dtype, owner) for each, owner in zip(inputs, owners, strict=True)]
        self.spread = Spread(kinds, self._forward, lambda piece: piece.count, self._keep, device)
        self._rows: dict[int, dict[int, Tensor]] = {number: {} for number in self.spread.own()}

    def rows(self, number: int, count: int) -> Tensor:
        """The first `count` rows of an own input (count x n), as the model has computed them."""
        pieces = self._rows[number]
        return torch.cat([pieces[first] for first in sorted(pieces)])[:count]

    def held(self) -> int:
        """Bytes of all rows that lie here."""
        return sum(part.nbytes for pieces in self._rows.values() for part in pieces.values())

    def _forward(self, piece: Piece) -> list[Tensor]:
        attention = self.loss.model.config._attn_implementation  # type: ignore[union-attr]
        batch = collate([self.store[piece.sequence]], str(attention))
        # The tokens that are supervised themselves, as PEFT's label mask has it, not those that predict them.
        places = batch.predicts[: piece.count] + 1
        return rows_of(self.loss, self.targets, self.inputs, batch.to(self.device), places.to(self.device))

    def _keep(self, number: int, piece: Piece, rows: Tensor) -> None:
        self._rows[number][piece.first] = rows
