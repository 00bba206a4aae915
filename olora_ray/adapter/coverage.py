"""How much of a model lies behind an adapter, and what does not."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from olora_ray.adapter.layer import is_linear
from olora_ray.adapter.parts import other_parts, output_head, part_of
from olora_ray.adapter.targets import Selection


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
