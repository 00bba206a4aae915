"""The inputs of layers as the model runs: which layers have one in common, and its rows at chosen tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from olora_ray.adapter.targets import Target
from olora_ray.common.errors import UserError
from olora_ray.tokens.collate import Batch
from olora_ray.train.loss import SupervisedLoss

See = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class LayerInput:
    """One input, with a row for each token, and the layers that it goes to (q, k and v; gate and up)."""

    layers: tuple[str, ...]
    size: int
    """n."""
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """That of its first layer."""
        return self.layers[0]

    @property
    def row_bytes(self) -> int:
        """Of one token."""
        return self.size * self.dtype.itemsize


@torch.no_grad()
def inputs_of(loss: SupervisedLoss, targets: Mapping[str, Target], probe: Batch) -> list[LayerInput]:
    """The inputs of all targets, in the order of their first layers, found by running the model on a few tokens.

    Raises UserError for a layer that does not see each token once, as an expert of a mixture. All workers of a sharded
    base must call it together; `probe` is the same everywhere.
    """
    kept: dict[str, Tensor] = {}  # alive till the end, so that no two have the same memory

    def see(name: str, x: Tensor) -> None:
        if name in kept:
            raise UserError(_refusal(name, "is used several times for a token"))
        kept[name] = x

    with _watched({name: target.module for name, target in targets.items()}, see):
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

    def see(name: str, x: Tensor) -> None:
        try:
            _check_rows(name, x, batch)
            found[name] = _finite(name, x.reshape(-1, x.shape[-1])[places]).cpu()
        except UserError as error:
            problems.append(error)

    with _watched({each.name: targets[each.name].module for each in inputs}, see):
        loss(batch)
    if problems:
        raise problems[0]
    return [found[each.name] for each in inputs]


def _finite(name: str, rows: Tensor) -> Tensor:
    if not torch.isfinite(rows).all():
        raise UserError(f"model.name: the input of {name} has NaN or infinite values on the training data")
    return rows


@contextmanager
def _watched(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Have `see` called with each input of these modules."""
    handles = [
        module.register_forward_pre_hook(partial(_hand_over, name, see), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_over(name: str, see: See, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    see(name, inputs[0] if inputs else next(iter(named.values())))


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
