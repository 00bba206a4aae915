"""The weights that `adapter.targets` means.

"all-linear" means what the literature does (QLoRA, arXiv 2305.14314, section 4): every linear layer of the language
model, experts included. What it leaves out, and why, stands in `Selection.left_out`; see adapter/candidates.py.

Names: a linear layer's is that of the module ("model.layers.0.self_attn.q_proj"); that of experts whose weights are
one parameter is the parameter's ("model.layers.0.mlp.experts.gate_up_proj").
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from olora_ray.adapter.candidates import Candidate, Reason, Target, candidates
from olora_ray.common.errors import UserError

__all__ = ["Selection", "Target", "find_targets", "select"]


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
    an entry that matches nothing, for what cannot be adapted, and for a rank that a layer is too small for.
    """
    found = candidates(model)
    if isinstance(targets, str):
        reasons = {name: item.aside or item.refused for name, item in found.items()}
        chosen = [name for name, reason in reasons.items() if reason is None]
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
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
    _check_rank(selected, rank)
    return Selection(selected, left_out)


def _check_rank(selected: Mapping[str, Target], rank: int) -> None:
    for name, target in selected.items():
        m, n = target.shape
        if rank > min(m, n):
            raise UserError(
                f"adapter.rank={rank} is too large for {name} ({m} x {n}): use at most {min(m, n)}, or leave the"
                " layer out of adapter.targets"
            )


def _matches(entry: str, found: Mapping[str, Candidate]) -> list[str]:
    matched = [name for name, item in found.items() if _is_suffix(entry, [name, *item.other_names()])]
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


def _is_suffix(entry: str, names: Iterable[str]) -> bool:
    return any(name == entry or name.endswith("." + entry) for name in names)
