"""The linear maps of a model: which of them an adapter can take, and which of these "all-linear" means.

A linear map is a linear layer, or a stack: the experts of a mixture whose weights are one parameter of E x m x n (or E
x n x m). An adapter can take neither the output head, nor a layer whose weight the model's own code reads, nor packed
weights that are not known. "all-linear" also leaves out routers, layers with one input or output and, in a model that
sees or hears, all that is outside the language model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olora_ray.adapter.layer import is_linear, is_transposed, weight_facts
from olora_ray.model.quantised import QuantisedLinear

# The parts of a model: its language model, what stands beside that, and its output head.


def output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    assert head is None or isinstance(head, nn.Module)
    return head


def other_parts(model: nn.Module) -> dict[str, str]:
    """Return the modules beside the language model, name -> what it is; empty for a model of text alone.

    transformers names the language model (`get_decoder`).
    """
    shape: Any = getattr(model, "config", None)
    get_text_config = getattr(shape, "get_text_config", None)
    get_decoder = getattr(model, "get_decoder", None)
    if get_text_config is None or get_decoder is None:
        return {}
    try:
        if get_text_config(decoder=True) is shape:
            return {}
    except ValueError:  # several parts that make text
        return {}
    modules = dict(model.named_modules())
    decoder = get_decoder()
    inside = next((name for name, module in modules.items() if module is decoder), "")
    if not inside:
        return {}
    head = output_head(model)
    path = inside.split(".")
    parts = {}
    for depth in range(len(path)):
        for child, module in modules[".".join(path[:depth])].named_children():
            if child != path[depth] and module is not head:
                parts[".".join([*path[:depth], child])] = child.replace("_", " ")
    return parts


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A weight that can be adapted: a linear layer's, or a stack of all experts' weights."""

    module: nn.Module
    parameter: str
    stored_transposed: bool
    """True if it is stored as (E x) n x m instead of (E x) m x n."""
    experts: int | None = None
    """E of a stack; None for a linear layer."""
    read: Callable[[int, int], Tensor] | None = None
    """Reads rows first..last of the whole parameter, if this worker's module holds only a part of it."""

    @property
    def shape(self) -> tuple[int, int]:
        *_, m, n = self.whole_shape
        return m, n

    @property
    def whole_shape(self) -> tuple[int, ...]:
        if isinstance(self.module, QuantisedLinear):
            return tuple(weight_facts(self.module).shape)
        return tuple(self.weight().shape)

    def weight(self) -> Tensor:
        """Return the stored weight as m x n or E x m x n: a detached view."""
        weight = getattr(self.module, self.parameter).detach()
        assert isinstance(weight, Tensor)
        return weight.mT if self.stored_transposed else weight

    def numbers(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return the weight like `weight`, but complete on this worker; for a stack only experts first..last."""
        if self.read is None:
            return self.weight()[first:last]
        rows = len(getattr(self.module, self.parameter))
        weight = self.read(first, rows if last is None else min(last, rows))
        return weight.mT if self.stored_transposed else weight


@dataclass(frozen=True)
class Reason:
    """The reason why a linear map is not adapted."""

    what: str
    """The map, to follow "NAME is"."""
    kind: str
    """The name of all such maps, in the plural."""
    by_design: bool = False
    """True if no user expects such a map to be adapted."""


HEAD = Reason("the output head", "output head", by_design=True)
ROUTER = Reason("a router", "routers", by_design=True)
GATE = Reason("a gate of one row", "gates of one row", by_design=True)
READ = Reason(
    "a layer whose weight the model's code reads directly",
    "layers whose weight the model's code reads directly",
)

NOT_IN_PEFT = Reason(
    "a layer that PEFT does not adapt in such a model",
    "layers that PEFT does not adapt in such a model",
)
MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""PEFT refuses layers called out_proj in these families, and the whole adapter with them (peft.tuners.tuners_utils)."""


@dataclass(frozen=True)
class Candidate:
    target: Target
    module_name: str
    refused: Reason | None = None
    """The reason why no adapter can take it."""
    aside: Reason | None = None
    """The reason why "all-linear" leaves it out."""


def candidates(model: nn.Module) -> dict[str, Candidate]:
    head = output_head(model)
    family = getattr(getattr(model, "config", None), "model_type", None)
    modules = dict(model.named_modules())
    blocks = dict(_mixtures(modules))
    maps: dict[str, Candidate] = {}
    for name, module in modules.items():
        if is_linear(module):
            target = Target(module, "weight", is_transposed(module))
            if family in MAMBA_TYPES and name.rpartition(".")[2] == "out_proj":
                aside: Reason | None = NOT_IN_PEFT
            else:
                aside = _aside(name, modules, blocks)
            maps[name] = Candidate(target, name, _refused(name, modules, head), aside)
        # Experts of a mixture may be parameters of the module itself, which is no linear layer then.
        for parameter, _ in _stacks(module):
            target = stack(module, parameter)
            refused = None
            dtype = target.weight().dtype
            if dtype not in _FLOATS:
                what = f"a set of experts with packed weights ({str(dtype).removeprefix('torch.')})"
                refused = Reason(what, "experts with packed weights")
            maps[f"{name}.{parameter}"] = Candidate(target, name, refused)
    for part, what in other_parts(model).items():
        for name, item in maps.items():
            if name.startswith(f"{part}.") or name == part:
                maps[name] = replace(item, aside=Reason(f"a part of the {what}", what))
    return maps


def plain_layers(model: nn.Module) -> list[str]:
    """Return the names of the torch.nn.Linear layers that an adapter can take, without routers and gates."""
    return [
        name
        for name, item in candidates(model).items()
        if type(item.target.module) is nn.Linear
        and item.refused is None
        and item.aside not in (ROUTER, GATE)
    ]


def _refused(name: str, modules: dict[str, nn.Module], head: nn.Module | None) -> Reason | None:
    module = modules[name]
    if module is head:
        return HEAD
    # The code of Mamba, FalconMamba and Jamba multiplies with the weight of their step sizes itself. The self-test
    # finds other layers whose weight the model's code reads: adapter/layer.py raises TakenWeight there.
    parent, _, last = name.rpartition(".")
    if last == "dt_proj" and hasattr(modules[parent], "A_log"):
        return READ
    if isinstance(module, QuantisedLinear):
        return None
    # compressed-tensors replaces the weight by other parameters.
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and (
        not isinstance(weight, Tensor)
        or weight.dtype not in _FLOATS
        or weight.shape != (module.out_features, module.in_features)
    ):
        form = str(getattr(weight, "dtype", type(weight).__name__)).removeprefix("torch.")
        return Reason(
            f"a layer with packed weights ({type(module).__name__}, {form})",
            "layers with packed weights",
        )
    if not _computes_a_linear_map(module):
        what = f"{type(module).__name__}, which computes more than a linear map"
        return Reason(f"a {what}", what)
    return None


def _computes_a_linear_map(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    # Only a call tells what a subclass of Linear computes, so a copy with a weight of 6 x 5 is called: the model's own
    # weights may be large, sharded or missing.
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(6, 5, generator=generator)
    x = torch.rand(4, 5, generator=generator)
    bias = None if module.bias is None else torch.rand(6, generator=generator)
    small = copy.copy(module)
    small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    small.__dict__.update(in_features=5, out_features=6)
    try:
        with torch.no_grad():
            y = small(x)
    except Exception:  # a linear layer takes any x
        return False
    if not isinstance(y, Tensor) or y.shape != (4, 6):
        return False
    return torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)


# The linear maps that "all-linear" leaves out.


def _aside(
    name: str, modules: dict[str, nn.Module], blocks: dict[str, tuple[str, set[int]]]
) -> Reason | None:
    module = modules[name]
    if isinstance(module, QuantisedLinear):
        shape: Any = weight_facts(module).shape
    else:
        shape = getattr(getattr(module, "weight", None), "shape", ())
    if len(shape) == 2 and 1 in shape:
        return GATE
    if _is_router(name, modules, blocks):
        return ROUTER
    return None


def _is_router(
    name: str, modules: dict[str, nn.Module], blocks: dict[str, tuple[str, set[int]]]
) -> bool:
    path = name.split(".")
    above = [".".join(path[:depth]) for depth in range(len(path), 0, -1)]
    for each in above:
        kind = type(modules[each]).__name__
        if "Router" in kind or "Gating" in kind:
            return True
    module = modules[name]
    if not isinstance(module, nn.Linear):
        return False
    for block in above[1:]:
        experts, counts = blocks.get(block, ("", set()))
        if module.out_features in counts and not name.startswith(f"{experts}."):
            # A router's outputs are its last step. A hidden layer may have as many outputs by chance: then a layer
            # beside it takes them as its inputs.
            beside = [each for each in modules[above[1]].children() if isinstance(each, nn.Linear)]
            return all(each.in_features != module.out_features for each in beside)
    return False


def _mixtures(modules: dict[str, nn.Module]) -> Iterator[tuple[str, tuple[str, set[int]]]]:
    """Yield the block around each mixture's experts -> (name of the experts, numbers of experts it may have)."""
    for name, module in modules.items():
        block, _, last = name.rpartition(".")
        counts = {experts for _, experts in _stacks(module)}
        if isinstance(module, nn.ModuleList) and "expert" in last:
            counts.add(len(module))
        if counts:
            yield block, (name, counts)


# Experts whose weights are one parameter.


def _stacks(module: nn.Module) -> Iterator[tuple[str, int]]:
    count = getattr(module, "num_experts", None)
    named = "Expert" in type(module).__name__
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and len(parameter) > 1 and (named or len(parameter) == count):
            yield name, len(parameter)


def stack(module: nn.Module, parameter: str) -> Target:
    # transformers' interface for experts says whether they are transposed. Modules without it store E x m x n, except
    # Llama 4's. A wrong guess does no harm: adapter/layer.py refuses a product that takes them the other way round.
    transposed = type(module).__name__ == "Llama4TextExperts"
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        transposed = bool(module.is_transposed)
    return Target(module, parameter, transposed, len(getattr(module, parameter)))


# The names of adapted layers: the parameter that each means, and its layout.


def parameter_of(model: nn.Module, layer: str) -> str:
    return layer if is_stack(model, layer) else f"{layer}.weight"


def is_stack(model: nn.Module, layer: str) -> bool:
    """True if the name is a parameter's, which holds the weights of several experts; False for a linear layer's."""
    try:
        model.get_submodule(layer)
    except AttributeError:
        return True
    return False


def stored_transposed(model: nn.Module, layer: str) -> bool:
    """True if the layer's parameter is n x m (or E x n x m) instead of m x n."""
    if not is_stack(model, layer):
        return is_transposed(model.get_submodule(layer))
    experts, _, parameter = layer.rpartition(".")
    return stack(model.get_submodule(experts), parameter).stored_transposed
