"""Injection of adapters: wraps the layers to adapt, and takes the wrapping off again."""

from collections.abc import Mapping

from torch import nn

from olora_ray.adapter.candidates import stack
from olora_ray.adapter.experts import AdaptedExperts, AdaptedStack
from olora_ray.adapter.factors import Factors
from olora_ray.adapter.layer import AdaptedLinear, AdaptedWeight
from olora_ray.adapter.parts import output_head
from olora_ray.adapter.targets import find_targets

__all__ = ["find_targets", "inject", "install", "output_head", "remove", "wrap"]


def inject(
    model: nn.Module, factors: Mapping[str, Factors], scale: float, dropout: float = 0.0
) -> dict[str, AdaptedWeight]:
    """Freeze the model and adapt each weight named in `factors`; returns the adapters by name, see `wrap`."""
    adapted = wrap(model, factors, scale, dropout)
    install(model, adapted)
    return adapted


def wrap(
    model: nn.Module, factors: Mapping[str, Factors], scale: float, dropout: float = 0.0
) -> dict[str, AdaptedWeight]:
    """Freeze the model and make an adapter of each weight named in `factors`; the model does not use them yet.

    Each has the rank of its factors; a weight whose factors have rank 0 gets none.
    Several sets of adapters may share one base: only the one that is installed last takes part.
    """
    model.requires_grad_(False)
    return {name: _adapter(model, name, start, scale, dropout) for name, start in factors.items() if start.rank}


def _adapter(model: nn.Module, name: str, start: Factors, scale: float, dropout: float) -> AdaptedWeight:
    if start.a0.dim() == 2:
        return AdaptedLinear(_base(model.get_submodule(name)), start, scale, dropout)
    module, _, parameter = name.rpartition(".")
    found = stack(_base(model.get_submodule(module)), parameter)
    return AdaptedStack(start, found.shape[0], found.stored_transposed, scale, dropout)


def install(model: nn.Module, adapted: Mapping[str, AdaptedWeight]) -> None:
    """Put adapters in the places of their bases, or of other adapters of these."""
    stacks: dict[str, dict[str, AdaptedStack]] = {}
    for name, layer in adapted.items():
        parent, _, attribute = name.rpartition(".")
        if isinstance(layer, AdaptedStack):
            stacks.setdefault(parent, {})[attribute] = layer
        else:
            setattr(model.get_submodule(parent), attribute, layer)
    for name, parts in stacks.items():
        parent, _, attribute = name.rpartition(".")
        experts = _base(model.get_submodule(name))
        setattr(model.get_submodule(parent), attribute, AdaptedExperts(experts, parts))


def remove(model: nn.Module) -> None:
    """Put the base layers back: afterwards the model is the untouched base again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear | AdaptedExperts):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.base)


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedLinear | AdaptedExperts) else module
