"""The change of a parameter by its adapter, in the parameter's own layout, some rows at a time.

A parameter is m x n, or n x m where it is stored transposed (GPT-2's Conv1D); a stack of experts is E x m x n, or
E x n x m. Rows are what the first dimension counts: of a stack, experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from olora_ray.adapter.candidates import stack
from olora_ray.adapter.layer import AdapterWeights, Factors, is_transposed

UNIT = torch.finfo(torch.float32).eps / 2
"""Relative error of one rounding in float32."""


@dataclass(frozen=True)
class Change:
    """What one layer's adapter adds to its parameter."""

    weights: AdapterWeights
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        *experts, m, _ = self.weights.db.shape
        n = self.weights.da.shape[-1]
        return (*experts, n, m) if self.transposed else (*experts, m, n)

    def expert(self, number: int) -> "Change":
        """That of one expert of a stack."""
        part = _experts(self.weights, number, number + 1)
        start = part.factors
        factors = replace(start, a0=start.a0[0], b0=None if start.b0 is None else start.b0[0])
        return Change(AdapterWeights(factors, part.da[0], part.db[0]), self.scale, self.transposed)

    def outputs(self, first: int, last: int) -> "Change":
        """That of outputs first..last of a linear layer."""
        return Change(_rows(self.weights, first, last), self.scale, self.transposed)

    def merged(self, first: int, last: int, device: torch.device) -> Tensor:
        """Rows first..last in float32, as they are added to the base."""
        delta = _moved(self._part(first, last), device, torch.float32).delta(self.scale)
        return delta.mT if self.transposed else delta

    def exact(self, first: int, last: int, device: torch.device) -> Tensor:
        """Rows first..last in float64: the paper's form s (B A - B0 A0), which shares no step with `merged`."""
        part = _moved(self._part(first, last), device, torch.float64)
        a0, b0 = part.factors.a0, part.factors.b0
        start = torch.zeros_like(part.db) if b0 is None else b0
        delta = self.scale * ((start + part.db) @ (a0 + part.da) - start @ a0)
        return delta.mT if self.transposed else delta

    def slack(self, first: int, last: int, device: torch.device) -> Tensor:
        """By how much float32 may have `merged` miss `exact`: (k + 6) u |B| |A| for an inner dimension of k.

        Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.5: holds for any order of the sums.
        """
        part = _moved(self._part(first, last), device, torch.float32)
        a0, b0 = part.factors.a0.abs(), part.factors.b0
        b = part.db.abs() if b0 is None else b0.abs() + part.db.abs()
        terms = 2 * part.da.shape[-2] + 6
        bound = abs(self.scale) * terms * UNIT * (part.db.abs() @ a0 + b @ part.da.abs())
        return bound.mT if self.transposed else bound

    def _part(self, first: int, last: int) -> AdapterWeights:
        if self.weights.da.ndim == 3:
            return _experts(self.weights, first, last)
        return _columns(self.weights, first, last) if self.transposed else _rows(self.weights, first, last)


def _experts(weights: AdapterWeights, first: int, last: int) -> AdapterWeights:
    start = weights.factors
    b0 = None if start.b0 is None else start.b0[first:last]
    return AdapterWeights(
        replace(start, a0=start.a0[first:last], b0=b0), weights.da[first:last], weights.db[first:last]
    )


def _rows(weights: AdapterWeights, first: int, last: int) -> AdapterWeights:
    """The adapter of outputs first..last."""
    start = weights.factors
    b0 = None if start.b0 is None else start.b0[first:last]
    return AdapterWeights(replace(start, b0=b0), weights.da, weights.db[first:last])


def _columns(weights: AdapterWeights, first: int, last: int) -> AdapterWeights:
    """The adapter of inputs first..last."""
    start = replace(weights.factors, a0=weights.factors.a0[:, first:last])
    return AdapterWeights(start, weights.da[:, first:last], weights.db)


def _moved(weights: AdapterWeights, device: torch.device, dtype: torch.dtype) -> AdapterWeights:
    start = weights.factors
    b0 = None if start.b0 is None else start.b0.to(device, dtype)
    factors = Factors(start.a0.to(device, dtype), b0, start.full_rank)
    return AdapterWeights(factors, weights.da.to(device, dtype), weights.db.to(device, dtype))


# How a model keeps the layers that adapters change: which parameter, and whether it is transposed.


def parameter_of(model: nn.Module, layer: str) -> str:
    """The full name of a layer's parameter."""
    return layer if is_stack(model, layer) else f"{layer}.weight"


def is_stack(model: nn.Module, layer: str) -> bool:
    """Whether the name is that of a parameter, which holds several linear maps."""
    try:
        model.get_submodule(layer)
    except AttributeError:
        return True
    return False


def stored_transposed(model: nn.Module, layer: str) -> bool:
    """Whether the parameter is n x m (or E x n x m) instead of m x n."""
    if not is_stack(model, layer):
        return is_transposed(model.get_submodule(layer))
    experts, _, parameter = layer.rpartition(".")
    return stack(model.get_submodule(experts), parameter).stored_transposed


def declares_transposed(model: nn.Module, layer: str) -> bool:
    """What a stack's module says of itself in transformers' interface for experts, which PEFT goes by."""
    return bool(getattr(model.get_submodule(layer.rpartition(".")[0]), "is_transposed", False))


def transposed_layers(model: nn.Module, layers: Iterable[str]) -> frozenset[str]:
    """Those of the layers that are kept transposed."""
    return frozenset(layer for layer in layers if stored_transposed(model, layer))
