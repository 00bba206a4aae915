"""Injection of adapters: wraps the layers to adapt, and takes the wrapping off again."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from olora_ray.adapter.candidates import Candidate, Reason, Target, candidates, other_parts, output_head, part_of, stack
from olora_ray.adapter.layer import AdaptedExperts, AdaptedLinear, AdaptedStack, AdaptedWeight, Factors, is_linear
from olora_ray.common.errors import UserError

# The weights that `adapter.targets` means.


@dataclass(frozen=True)
class Selection:
    """What is adapted, and what is not."""

    targets: dict[str, Target]
    """By name, in the model's order."""
    left_out: dict[str, Reason]
    """Linear layers and experts that "all-linear" leaves out, by name, with the reason; empty for named targets."""


def find_targets(model: nn.Module, targets: str | tuple[str, ...], rank: int) -> dict[str, Target]:
    """Name -> target for `adapter.targets`, in the model's order; raises UserError as `select` does."""
    return select(model, targets, rank).targets


def select(model: nn.Module, targets: str | tuple[str, ...], rank: int) -> Selection:
    """What `adapter.targets` means in this model.

    Each entry of a tuple is a name, a dotted suffix of one, or a regular expression for the whole of it;
    for experts the name of their module, or a suffix of it, means all of its weights. Raises UserError for
    an entry that matches nothing, for what cannot be adapted, and for a rank that a named layer is too small for;
    "all-linear" leaves such a layer out.
    """
    found = candidates(model)
    if isinstance(targets, str):
        small = f"smaller than adapter.rank={rank}"
        too_small = Reason(f"a layer {small}", f"layers {small}")
        reasons = {name: item.aside or item.refused for name, item in found.items()}
        linear = [name for name, reason in reasons.items() if reason is None]
        # If all are too small, the rank is what is wrong.
        chosen = [name for name in linear if rank <= min(found[name].target.shape)] or linear
        left_out = {name: reason or too_small for name, reason in reasons.items() if name not in chosen}
    else:
        named = {name for entry in targets for name in _matches(entry, found)}
        chosen = [name for name in found if name in named]
        left_out = {}
        for name in chosen:
            if refused := found[name].refused:
                raise UserError(f"adapter.targets: {name!r} is {refused.what}, which is not adapted; leave it out")
    if not chosen:
        kinds = ", ".join(dict.fromkeys(reason.kind for reason in left_out.values()))
        raise UserError(f"adapter.targets: the model has no linear layer to adapt{f', only {kinds}' if kinds else ''}")
    selected = {name: found[name].target for name in chosen}
    for name, target in selected.items():
        m, n = target.shape
        if rank > min(m, n):
            raise UserError(
                f"adapter.rank={rank} is too large for {name} ({m} x {n}): use at most {min(m, n)}, or leave the"
                " layer out of adapter.targets"
            )
    return Selection(selected, left_out)


def _matches(entry: str, found: Mapping[str, Candidate]) -> list[str]:
    # Experts go by their module's name, too.
    names = {name: [name] if item.target.experts is None else [name, item.module_name] for name, item in found.items()}
    matched = [name for name, known in names.items() if any(f".{each}".endswith(f".{entry}") for each in known)]
    if not matched:
        try:
            matched = [name for name in found if re.fullmatch(entry, name)]
        except re.error as error:
            raise UserError(f"adapter.targets: {entry!r} is not a regular expression: {error}") from None
    if not matched:
        kinds = sorted({name.rpartition(".")[2] for name in found})
        raise UserError(
            f"adapter.targets: {entry!r} matches no linear layer; the model has {', '.join(kinds)}"
            f" (for example {next(iter(found), 'none')})"
        )
    return matched


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
        return AdaptedLinear(_base(model.get_submodule(name)), start, scale, dropout, name)
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


# How much of a model lies behind an adapter, and what does not.


@dataclass(frozen=True)
class Coverage:
    """The parameters of a model by whether they are adapted; one that is used twice counts once."""

    adapted: int
    """Parameters of the adapted weights."""
    others: dict[str, int]
    """The other parameters by what they are ("embeddings"), most first."""

    @property
    def share(self) -> float:
        """The adapted parameters' share of all."""
        return self.adapted / (self.adapted + sum(self.others.values()))


def coverage(model: nn.Module, selection: Selection) -> Coverage:
    """The coverage of a model by what was selected of it; needs no weights."""
    adapted = {id(getattr(target.module, target.parameter)) for target in selection.targets.values()}
    parts, head, total = other_parts(model), output_head(model), 0
    others: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if id(parameter) in adapted:
            total += parameter.numel()
        else:
            owner = name.rpartition(".")[0]
            is_head = model.get_submodule(owner) is head
            kind = "output head" if is_head else part_of(name, parts) or _kind(model, name, owner, selection)
            others[kind] += parameter.numel()
    return Coverage(total, dict(others.most_common()))


def _kind(model: nn.Module, name: str, owner: str, selection: Selection) -> str:
    module = model.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if reason := selection.left_out.get(name) or (selection.left_out.get(owner) if name.endswith(".weight") else None):
        return reason.kind
    if "Expert" in type(module).__name__ and not name.endswith("bias"):
        return "experts"
    linear = is_linear(module) and name.endswith(".weight")
    return "layers that adapter.targets does not name" if linear else "norms, biases and others"
