"""Gradients of layers' weights on the first supervised tokens of a training, each on the worker that owns the layer.

The weights are frozen and stay so: the gradient of W in y = W x is the sum over tokens of (dL/dy) x^T, made of what
flows through the layer. Owners sum the sequences in their order, so that the sum is the same for any number of workers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from olora_ray.adapter.targets import Target
from olora_ray.common.errors import UserError
from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.store import TokenStore
from olora_ray.train.first_tokens import Piece
from olora_ray.train.layer_inputs import LayerInput
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.spread import Rows, Spread


class Gradients:
    """Of the summed loss of the wanted tokens, by layer, for the inputs that this worker owns."""

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
        self._names: list[tuple[int, str | None]] = []
        """What each kind of rows is: an input, or what flows back to one of its layers."""
        kinds = []
        for number, (each, owner) in enumerate(zip(inputs, owners, strict=True)):
            for name in (None, *each.layers):
                size = each.size if name is None else targets[name].shape[0]
                self._names.append((number, name))
                kinds.append(Rows(size, each.dtype, owner))
        self.spread = Spread(kinds, self._backward, self._count, self._keep, device)
        self.sums: dict[str, Tensor] = {}
        """Name of an own layer -> m x n, float32."""
        self._x: dict[tuple[int, int], Tensor] = {}

    def held(self) -> int:
        """Bytes of the gradients that lie here."""
        return sum(part.nbytes for part in self.sums.values())

    def _count(self, piece: Piece) -> int:
        """All tokens of a sequence: what is not supervised is attended to."""
        return len(self.store[piece.sequence].input_ids)

    def _backward(self, piece: Piece) -> list[Tensor]:
        attention = self.loss.model.config._attn_implementation  # type: ignore[union-attr]
        whole = collate([self.store[piece.sequence]], str(attention)).to(self.device)
        batch = Batch(whole.inputs, whole.predicts[: piece.count], whole.labels[: piece.count], whole.tokens)
        modules = {name: self.targets[name].module for each in self.inputs for name in each.layers}
        x, g = _flows(self.loss, modules, {each.name for each in self.inputs}, batch)
        return [x[self.inputs[number].name] if name is None else g[name] for number, name in self._names]

    def _keep(self, kind: int, piece: Piece, rows: Tensor) -> None:
        number, name = self._names[kind]
        if name is None:
            self._x[number, piece.first] = rows
            return
        x = self._x[number, piece.first]
        part = rows.to(self.device, torch.float32).mT @ x.to(self.device, torch.float32)
        self.sums[name] = part if name not in self.sums else self.sums[name].add_(part)
        if name == self.inputs[number].layers[-1]:
            del self._x[number, piece.first]


def _flows(
    loss: SupervisedLoss, modules: Mapping[str, nn.Module], wanted: set[str], batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The wanted layers' inputs (tokens x n) and the gradient at all outputs (tokens x m), on the CPU."""
    x: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    with torch.enable_grad(), _watched(loss, modules, wanted, x, g):
        loss(batch).backward()
    for name in modules:
        if name not in g:
            raise UserError(f"adapter.method: no gradient reaches {name}; leave it out of adapter.targets")
        if not torch.isfinite(g[name]).all():
            raise UserError(f"model.name: the gradient at {name} has NaN or infinite values on the training data")
    return x, g


@contextmanager
def _watched(
    loss: SupervisedLoss, modules: Mapping[str, nn.Module], wanted: set[str], x: dict[str, Tensor], g: dict[str, Tensor]
) -> Iterator[None]:
    """Have what flows through these modules noted."""
    model: Any = loss.model
    # Nothing of the base is trained: gradients flow because its first hidden states are said to want one.
    handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())]
    handles += [
        module.register_forward_hook(partial(_note, name, x if name in wanted else {}, g), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(
    name: str,
    x: dict[str, Tensor],
    g: dict[str, Tensor],
    _: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    output: Tensor,
) -> None:
    entered: Tensor = inputs[0] if inputs else next(iter(named.values()))
    x[name] = entered.detach().reshape(-1, entered.shape[-1]).cpu()

    def note(gradient: Tensor) -> None:
        g[name] = gradient.reshape(-1, gradient.shape[-1]).cpu()

    output.register_hook(note)
