"""The linear maps of a model: which an adapter can take, and which of them "all-linear" means.

A linear map is a linear layer, or the experts of a mixture whose weights are one parameter of E x m x n (or
E x n x m): a stack. Not adapted at all: the output head, layers whose weight the model's code takes for itself, and
weights that are packed. Not meant by "all-linear": what is not in the language model of a model that also sees or
hears, routers, and layers with one input or output.
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
    """The module that makes logits, if the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    assert head is None or isinstance(head, nn.Module)
    return head


def other_parts(model: nn.Module) -> dict[str, str]:
    """The modules beside the language model of a model that has other parts: name -> what it is; none of a text model.

    Where the language model is, transformers says (`get_decoder`).
    """
    modules = dict(model.named_modules())
    shape: Any = getattr(model, "config", None)
    get_text_config, get_decoder = getattr(shape, "get_text_config", None), getattr(model, "get_decoder", None)
    if get_text_config is None or get_decoder is None or not _has_parts(get_text_config, shape):
        return {}
    decoder = get_decoder()
    inside = next((name for name, module in modules.items() if module is decoder), "")
    around = {".".join(inside.split(".")[:depth]) for depth in range(len(inside.split(".")) + 1)} if inside else set()
    return {
        f"{parent}.{child}".lstrip("."): child.replace("_", " ")
        for parent in sorted(around - {inside})
        for child, module in modules[parent].named_children()
        if f"{parent}.{child}".lstrip(".") not in around and module is not output_head(model)
    }


def _has_parts(get_text_config: Any, shape: Any) -> bool:
    try:
        return get_text_config(decoder=True) is not shape
    except ValueError:  # several parts that make text
        return False


def part_of(name: str, parts: dict[str, str]) -> str | None:
    """Which of the other parts something belongs to, by its name."""
    return next((what for part, what in parts.items() if f"{name}.".startswith(f"{part}.")), None)


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A weight that can be adapted: a linear layer's, or that of all experts of a mixture."""

    module: nn.Module
    parameter: str
    """The name of the weight in the module."""
    stored_transposed: bool
    """Whether it is kept as (E x) n x m instead of (E x) m x n."""
    experts: int | None = None
    """E of a stack; None of a linear layer."""
    read: Callable[[int, int], Tensor] | None = None
    """Reads rows first..last of the parameter from where all of it is, if the module holds only a part of it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): output and input features, of each expert for a stack."""
        *_, m, n = self.whole_shape
        return m, n

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """(m, n), or (E, m, n) of a stack."""
        if isinstance(self.module, QuantisedLinear):
            return tuple(weight_facts(self.module).shape)
        return tuple(self.weight().shape)

    def weight(self) -> Tensor:
        """The weight as it is stored, as m x n or E x m x n (a view), detached."""
        weight = getattr(self.module, self.parameter).detach()
        assert isinstance(weight, Tensor)
        return weight.mT if self.stored_transposed else weight

    def numbers(self, first: int = 0, last: int | None = None) -> Tensor:
        """The weight as `weight` gives it, of a stack only experts first..last, all of it on this worker."""
        if self.read is None:
            return self.weight() if self.experts is None else self.weight()[first:last]
        rows = len(getattr(self.module, self.parameter))
        found = self.read(first, rows if last is None else min(last, rows))
        return found.mT if self.stored_transposed else found


@dataclass(frozen=True)
class Reason:
    """Why a linear map is not adapted."""

    what: str
    """What it is, to follow "NAME is"."""
    kind: str
    """What such maps are together."""


HEAD = Reason("the output head", "output head")
ROUTER = Reason("a router", "routers")
GATE = Reason("a gate of one row", "gates of one row")
READ = Reason(
    "a layer whose weight the model's code takes for itself", "layers whose weight the model's code takes for itself"
)

NOT_IN_PEFT = Reason(
    "a layer that PEFT takes no adapter for in such a model", "layers that PEFT takes no adapter for in such a model"
)
MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Of these PEFT refuses the layers called out_proj, and with them the whole adapter (peft.tuners.tuners_utils)."""


@dataclass(frozen=True)
class Candidate:
    """A linear map of the model."""

    target: Target
    module_name: str
    refused: Reason | None = None
    """Why it cannot be adapted."""
    aside: Reason | None = None
    """Why "all-linear" does not mean it."""


def candidates(model: nn.Module) -> dict[str, Candidate]:
    """The linear maps by name, in the model's order."""
    head, kind = output_head(model), getattr(getattr(model, "config", None), "model_type", None)
    modules = dict(model.named_modules())
    outside = other_parts(model)
    blocks = dict(_mixtures(modules))
    found: dict[str, Candidate] = {}
    for name, module in modules.items():
        if is_linear(module):
            item = Candidate(Target(module, "weight", is_transposed(module)), name)
            refused = HEAD if module is head else READ if _is_read(name, modules) else _refused(module)
            unknown = kind in MAMBA_TYPES and name.rpartition(".")[2] == "out_proj"
            aside = NOT_IN_PEFT if unknown else _aside(name, modules, blocks)
            found[name] = replace(item, refused=refused, aside=aside)
        for parameter, _ in _stacks(module):
            target = stack(module, parameter)
            packed = None
            if (dtype := target.weight().dtype) not in _FLOATS:
                what = f"a set of experts with packed weights ({str(dtype).removeprefix('torch.')})"
                packed = Reason(what, "experts with packed weights")
            found[f"{name}.{parameter}"] = Candidate(target, name, packed)
        for parameter in _other_experts(module):
            found[f"{name}.{parameter}"] = Candidate(Target(module, parameter, False), name, _unknown(module))
    for name, item in found.items():
        if part := part_of(name, outside):
            found[name] = replace(item, aside=Reason(f"a part of the {part}", part))
    return found


def _is_read(name: str, modules: dict[str, nn.Module]) -> bool:
    """True for the step sizes of Mamba, FalconMamba and Jamba, whose code multiplies with their weight itself.

    Of other layers whose weight a model takes for itself the self-test finds out: see adapter/layer.py.
    """
    parent, _, last = name.rpartition(".")
    return last == "dt_proj" and hasattr(modules[parent], "A_log")


def _refused(module: nn.Module) -> Reason | None:
    if isinstance(module, QuantisedLinear):
        return None
    weight = getattr(module, "weight", None)  # compressed-tensors has other parameters in its place
    if isinstance(module, nn.Linear) and (
        not isinstance(weight, Tensor)
        or weight.dtype not in _FLOATS
        or weight.shape != (module.out_features, module.in_features)
    ):
        kind = str(getattr(weight, "dtype", type(weight).__name__)).removeprefix("torch.")
        return Reason(f"a layer with packed weights ({type(module).__name__}, {kind})", "layers with packed weights")
    if not _computes_a_linear_map(module):
        what = f"{type(module).__name__}, which computes more than a linear map"
        return Reason(f"a {what}", what)
    return None


def _computes_a_linear_map(module: nn.Module) -> bool:
    """Whether a subclass of Linear with a forward of its own returns W x + b: asked of a small copy of it."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(6, 5, generator=generator), torch.rand(4, 5, generator=generator)
    bias = None if module.bias is None else torch.rand(6, generator=generator)
    small = copy.copy(module)
    small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    small.__dict__.update(in_features=5, out_features=6)
    try:
        with torch.no_grad():
            y = small(x)
    except Exception:  # whatever it expects, it is not what a linear layer does
        return False
    return isinstance(y, Tensor) and y.shape == (4, 6) and torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)


# What "all-linear" does not mean.


def _aside(name: str, modules: dict[str, nn.Module], blocks: dict[str, tuple[str, set[int]]]) -> Reason | None:
    module = modules[name]
    weight = weight_facts(module) if isinstance(module, QuantisedLinear) else getattr(module, "weight", None)
    shape = getattr(weight, "shape", ())
    if len(shape) == 2 and 1 in shape:
        return GATE
    return ROUTER if _is_router(name, modules, blocks) else None


def _is_router(name: str, modules: dict[str, nn.Module], blocks: dict[str, tuple[str, set[int]]]) -> bool:
    path = name.split(".")
    above = [".".join(path[:depth]) for depth in range(len(path), 0, -1)]
    if any("Router" in type(modules[each]).__name__ or "Gating" in type(modules[each]).__name__ for each in above):
        return True
    module = modules[name]
    if not isinstance(module, nn.Linear):
        return False
    for block in above[1:]:
        experts, counts = blocks.get(block, ("", set()))
        if module.out_features in counts and not name.startswith(f"{experts}."):
            # Logits of the experts go no further; a hidden layer that has as many features does.
            beside = [each for each in modules[above[1]].children() if isinstance(each, nn.Linear)]
            return all(each.in_features != module.out_features for each in beside)
    return False


def _mixtures(modules: dict[str, nn.Module]) -> Iterator[tuple[str, tuple[str, set[int]]]]:
    """The block around each mixture's experts -> (name of the experts, how many they may be)."""
    for name, module in modules.items():
        block, _, last = name.rpartition(".")
        counts = {experts for _, experts in _stacks(module)}
        if isinstance(module, nn.ModuleList) and "expert" in last:
            counts.add(len(module))
        if counts:
            yield block, (name, counts)


# Experts whose weights are one parameter.


def _stacks(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(parameter, E) for each parameter of a module that holds the weights of E experts."""
    count = getattr(module, "num_experts", None)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and len(parameter) > 1 and (len(parameter) == count or _named_experts(module)):
            yield name, len(parameter)


def _other_experts(module: nn.Module) -> Iterator[str]:
    """Parameters of a module of experts that are neither stacks nor biases: a layout that is not known."""
    stacks = {name for name, _ in _stacks(module)}
    for name, parameter in module.named_parameters(recurse=False):
        if _named_experts(module) and parameter.dim() > 1 and name not in stacks and "bias" not in name:
            yield name


def _unknown(module: nn.Module) -> Reason:
    what = f"experts whose layout the code of {type(module).__name__} does not tell"
    return Reason(f"a set of {what}", what)


def _named_experts(module: nn.Module) -> bool:
    return "Expert" in type(module).__name__


def stack(module: nn.Module, parameter: str) -> Target:
    """The target that a module's parameter is, which holds the weights of all experts."""
    # transformers' interface for experts says how they are kept. A module without it has E x m x n, but Llama 4's:
    # a product that takes them the other way round is refused (adapter/layer.py).
    declared = bool(module.is_transposed) if hasattr(module, "has_gate") and hasattr(module, "is_transposed") else None
    transposed = type(module).__name__ == "Llama4TextExperts" if declared is None else declared
    return Target(module, parameter, transposed, len(getattr(module, parameter)))


# The names of adapted layers: which parameter each means, and how that is kept.


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
