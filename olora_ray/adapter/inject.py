"""Injection of adapters: finds the layers to adapt, wraps them, and takes the wrapping off again."""

import re
from collections.abc import Mapping

from torch import nn

from olora_ray.adapter.factors import Factors
from olora_ray.adapter.layer import AdaptedLinear, is_linear, weight_matrix
from olora_ray.common.errors import UserError


def find_targets(model: nn.Module, targets: str | tuple[str, ...], rank: int) -> dict[str, nn.Module]:
    """Name -> linear module for `adapter.targets`, in the model's order.

    "all-linear" takes every linear layer but the output head; otherwise each entry is a module's
    name, a dotted suffix of it, or a regular expression for the whole name. Raises UserError for an
    entry that matches nothing, for the output head, and for a rank that a layer is too small for.
    """
    head = output_head(model)
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    inner = {name: module for name, module in linear.items() if module is not head}
    if isinstance(targets, str):
        chosen = set(inner)
    else:
        chosen = {name for entry in targets for name in _matches(entry, linear)}
        if refused := chosen - set(inner):
            raise UserError(
                f"adapter.targets: {sorted(refused)[0]!r} is the output head, which is not adapted; leave it out"
            )
    found = {name: module for name, module in inner.items() if name in chosen}
    if not found:
        raise UserError("adapter.targets: the model has no linear layer to adapt")
    for name, module in found.items():
        m, n = weight_matrix(module).shape
        if rank > min(m, n):
            raise UserError(
                f"adapter.rank={rank} is too large for {name} ({m} x {n}): use at most {min(m, n)}, or leave the"
                " layer out of adapter.targets"
            )
    return found


def inject(
    model: nn.Module, factors: Mapping[str, Factors], scale: float, dropout: float = 0.0
) -> dict[str, AdaptedLinear]:
    """Freeze the model and wrap each module named in `factors`; returns the wrappers by name."""
    adapted = wrap(model, factors, scale, dropout)
    install(model, adapted)
    return adapted


def wrap(
    model: nn.Module, factors: Mapping[str, Factors], scale: float, dropout: float = 0.0
) -> dict[str, AdaptedLinear]:
    """Freeze the model and make a wrapper of each module named in `factors`; the model does not use them yet.

    Several sets of wrappers may share one base: only the one that is installed last takes part.
    """
    model.requires_grad_(False)
    return {
        name: AdaptedLinear(_base(model.get_submodule(name)), start, scale, dropout) for name, start in factors.items()
    }


def install(model: nn.Module, adapted: Mapping[str, AdaptedLinear]) -> None:
    """Put wrappers in the places of their bases, or of other wrappers of these."""
    for name, layer in adapted.items():
        parent, attribute = _place(model, name)
        setattr(parent, attribute, layer)


def remove(model: nn.Module) -> None:
    """Put the base layers back: afterwards the model is the untouched base again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            parent, attribute = _place(model, name)
            setattr(parent, attribute, module.base)


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedLinear) else module


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    assert head is None or isinstance(head, nn.Module)
    return head


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _matches(entry: str, linear: Mapping[str, nn.Module]) -> list[str]:
    found = [name for name in linear if name == entry or name.endswith("." + entry)]
    if not found:
        try:
            found = [name for name in linear if re.fullmatch(entry, name)]
        except re.error as error:
            raise UserError(f"adapter.targets: {entry!r} is not a regular expression: {error}") from None
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"adapter.targets: {entry!r} matches no linear layer; the model has {', '.join(kinds)}"
            f" (for example {next(iter(linear), 'none')})"
        )
    return found
