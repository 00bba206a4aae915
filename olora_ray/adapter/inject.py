"""Injection of adapters: replaces layers by adapted ones, and puts the base layers back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from olora_ray.adapter.candidates import Candidate, Reason, Target, candidates, stack
from olora_ray.adapter.layer import (
    AdaptedExperts,
    AdaptedLinear,
    AdaptedStack,
    AdaptedWeight,
    Factors,
)
from olora_ray.common.errors import UserError, as_user_error

# The weights that `adapter.targets` means.


@dataclass(frozen=True)
class Selection:
    """The layers that `adapter.targets` selects, and the layers that it leaves out."""

    targets: dict[str, Target]
    """Name -> target, in the model's order."""
    left_out: dict[str, Reason]
    """Linear layers and experts that "all-linear" leaves out, name -> reason; empty if the targets are named."""


def find_targets(model: nn.Module, targets: str | tuple[str, ...], rank: int) -> dict[str, Target]:
    return select(model, targets, rank).targets


def select(model: nn.Module, targets: str | tuple[str, ...], rank: int) -> Selection:
    """Return the layers of this model that `adapter.targets` selects.

    Each entry of a tuple is a name, a dotted suffix of a name, or a regular expression that matches a whole name. For
    experts, the name of their module or a suffix of it selects all their weights. Raises UserError for an entry that
    matches nothing, for a layer that cannot be adapted, and for a named layer too small for the rank; "all-linear"
    leaves such a layer out.
    """
    maps = candidates(model)
    if isinstance(targets, str):
        small = f"smaller than adapter.rank={rank}"
        too_small = Reason(f"a layer {small}", f"layers {small}")
        reasons = {name: item.aside or item.refused for name, item in maps.items()}
        linear = [name for name, reason in reasons.items() if reason is None]
        # If all layers are too small they stay chosen, so that the error below names the rank and not the targets.
        chosen = [name for name in linear if rank <= min(maps[name].target.shape)] or linear
        left_out = {
            name: reason or too_small for name, reason in reasons.items() if name not in chosen
        }
    else:
        named = set[str]()
        for entry in targets:
            named.update(_matches(entry, maps))
        chosen = [name for name in maps if name in named]
        left_out = {}
        for name in chosen:
            refused = maps[name].refused
            if refused:
                raise UserError(
                    f"adapter.targets: {name!r} is {refused.what}, which cannot be adapted; leave it out"
                )
    if not chosen:
        problem = "adapter.targets: the model has no linear layer to adapt"
        if left_out:
            kinds = ", ".join(dict.fromkeys(reason.kind for reason in left_out.values()))
            problem += f", only {kinds}"
        raise UserError(problem)
    selected = {name: maps[name].target for name in chosen}
    for name, target in selected.items():
        m, n = target.shape
        if rank > min(m, n):
            raise UserError(
                f"adapter.rank={rank} is too large for {name} ({m} x {n}): use at most {min(m, n)}, or leave the"
                " layer out of adapter.targets"
            )
    return Selection(selected, left_out)


def _matches(entry: str, maps: Mapping[str, Candidate]) -> list[str]:
    # An entry may also name the module of experts, which selects each of its weights.
    suffix = f".{entry}"
    matched = [
        name
        for name, item in maps.items()
        if f".{name}".endswith(suffix) or f".{item.module_name}".endswith(suffix)
    ]
    if not matched:
        with as_user_error(f"adapter.targets: {entry!r} is not a regular expression", re.error):
            matched = [name for name in maps if re.fullmatch(entry, name)]
    if not matched:
        last_parts = sorted({name.rpartition(".")[2] for name in maps})
        raise UserError(
            f"adapter.targets: {entry!r} matches no linear layer; the model has {', '.join(last_parts)}"
            f" (for example {next(iter(maps), 'none')})"
        )
    return matched


def inject(
    model: nn.Module, factors: Mapping[str, Factors], scale: float, dropout: float = 0.0
) -> dict[str, AdaptedWeight]:
    """Freeze the model and adapt each weight named in `factors`; return the adapters by name, see `wrap`."""
    adapted = wrap(model, factors, scale, dropout)
    install(model, adapted)
    return adapted


def wrap(
    model: nn.Module, factors: Mapping[str, Factors], scale: float, dropout: float = 0.0
) -> dict[str, AdaptedWeight]:
    """Freeze the model and return an adapter for each weight named in `factors`; the model does not use them yet.

    Each adapter has the rank of its factors; a weight whose factors have rank 0 gets none. Several sets of adapters may
    share one base model: the model uses the set that was installed last.
    """
    model.requires_grad_(False)
    adapted: dict[str, AdaptedWeight] = {}
    for name, start in factors.items():
        if not start.rank:
            continue
        if start.a0.dim() == 2:
            base = _base(model.get_submodule(name))
            adapted[name] = AdaptedLinear(base, start, scale, dropout, name)
        else:
            module, _, parameter = name.rpartition(".")
            target = stack(_base(model.get_submodule(module)), parameter)
            m, _ = target.shape
            adapted[name] = AdaptedStack(start, m, target.stored_transposed, scale, dropout)
    return adapted


def install(model: nn.Module, adapted: Mapping[str, AdaptedWeight]) -> None:
    """Put adapters into the model in place of their base layers, or of other adapters on these layers."""
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
    """Put the base layers back: afterwards the model is the unchanged base model again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear | AdaptedExperts):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.base)


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedLinear | AdaptedExperts) else module
