"""How a model keeps the layers that adapters change: which parameter, and whether it is transposed.

A linear layer goes by its module's name ("...q_proj"), a stack of experts by its parameter's ("...experts.down_proj").
"""

from collections.abc import Iterable

from torch import nn

from olora_ray.adapter.candidates import stack
from olora_ray.adapter.layer import is_transposed


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
