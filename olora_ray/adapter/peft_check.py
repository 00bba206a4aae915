"""Whether PEFT reads an adapter folder as the layers and the changes that it was written from: this decides.

PEFT loads the folder on the model without weights, where each parameter has its shape and no memory, so that a model
of any size is checked in the memory of its adapter. Each layer's change as PEFT computes it is then compared with
s (B A - B0 A0) in float64.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from olora_ray.adapter.change import Change
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.layout import stored_transposed
from olora_ray.adapter.peft_folder import WEIGHTS
from olora_ray.common.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOUND = 1e-5
"""Relative error of a layer's change in PEFT, which computes it in float32."""
_ADAPTER = "default"
_AT_ONCE = 2**20


@dataclass(frozen=True)
class AsPeftReads:
    """What PEFT makes of an adapter folder."""

    error: float
    """Largest relative error (Frobenius norm) of a layer's change, of an expert's in stacks."""
    layer: str
    """Where that is."""
    problems: tuple[str, ...]
    """Why PEFT does not read the folder, or which layers it adapts otherwise."""

    @property
    def ok(self) -> bool:
        """Whether layers and changes are right (False for NaN)."""
        return not self.problems and self.error <= BOUND


@torch.inference_mode()
def check_adapter(
    folder: Path,
    model: "PreTrainedModel",
    adapter: Mapping[str, AdapterWeights],
    scale: float,
    only: Iterable[str] | None = None,
    device: torch.device | None = None,
) -> AsPeftReads:
    """Load the folder with PEFT on the model without weights; `only` names the layers whose changes are computed.

    `model` stays as it is.
    """
    try:
        wrapped = _load(folder, model)
    except Exception as error:  # of PEFT, whatever it does not support
        return AsPeftReads(float("inf"), "", (f"PEFT does not load it: {first_line(error)}",))
    layers = adapted_layers(wrapped.get_base_model(), model)
    if problems := _other_layers(folder, layers, adapter):
        return AsPeftReads(float("inf"), "", tuple(problems))
    where, worst = "", 0.0
    for name in adapter if only is None else only:
        change = Change(adapter[name], scale, stored_transposed(model, name))
        error = _error(layers[name], change, device or torch.device("cpu"))
        if error != error or error > worst:
            where, worst = name, error
        if worst != worst:
            break
    return AsPeftReads(worst, where, ())


def adapted_layers(base: nn.Module, model: nn.Module) -> dict[str, Any]:
    """PEFT's layers in a model that it has wrapped, by the names of the layers that they adapt."""
    found = {}
    for path, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            name = ".".join(part for part in path.split(".") if part != "base_layer")
            parameter = getattr(module, "parameter_name", None)
            stack = parameter is not None and model.get_parameter(f"{name}.{parameter}").ndim == 3
            found[f"{name}.{parameter}" if stack else name] = module
    return found


def _load(folder: Path, model: "PreTrainedModel") -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # low_cpu_mem_usage: no random matrices are made that the folder's would replace.
        return PeftModel.from_pretrained(
            weightless(model), str(folder), torch_device="cpu", low_cpu_mem_usage=True, use_safetensors=True
        )


def weightless(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy whose parameters are on the CPU and take no memory: PEFT moves an adapter to where its parameter is."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            flat = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(flat, requires_grad=False))
    return copied


def _other_layers(folder: Path, layers: Mapping[str, Any], adapter: Mapping[str, AdapterWeights]) -> list[str]:
    """Layers that PEFT leaves out or adapts besides, and matrices that it does not take from the file."""
    problems = []
    if missing := [name for name in adapter if name not in layers]:
        problems.append(f"PEFT does not adapt {_some(missing)}")
    if more := [name for name in layers if name not in adapter]:
        problems.append(f"PEFT adapts {_some(more)}, which the run did not")
    empty = [name for name in adapter if name in layers and any(part.is_meta for part in _matrices(layers[name]))]
    if empty:
        problems.append(f"PEFT finds no matrices for {_some(empty)}")
    with safe_open(folder / WEIGHTS, "pt") as file:
        spare = len(list(file.keys())) - 2 * len(adapter)
    if spare and not problems:
        problems.append(f"the file has {abs(spare)} matrices {'more' if spare > 0 else 'less'} than the run's layers")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _error(layer: Any, change: Change, device: torch.device) -> float:
    """Relative error of a layer's change; of a stack, the largest of its experts."""
    if len(change.shape) == 2:
        return _relative(layer.get_delta_weight(_ADAPTER), change, device)
    if layer.num_experts == 1:
        return _relative(layer.get_delta_weight(_ADAPTER), change.expert(0), device)
    worst = 0.0
    left, right, scale = layer.get_delta_factors(_ADAPTER)
    for number in range(layer.num_experts):
        error = _relative(left[number] @ right[number] * scale, change.expert(number), device)
        if error != error:
            return error
        worst = max(worst, error)
    return worst


def _relative(found: Tensor, change: Change, device: torch.device) -> float:
    if tuple(found.shape) != change.shape:
        return float("inf")
    wrong = size = 0.0
    count = max(1, _AT_ONCE // found.shape[1])
    for first in range(0, len(found), count):
        last = min(first + count, len(found))
        exact = change.exact(first, last, device)
        wrong += float((found[first:last].to(device).double() - exact).square().sum())
        size += float(exact.square().sum())
    return (wrong / size) ** 0.5 if size else wrong**0.5
