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
_CPU = torch.device("cpu")


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


@torch.no_grad()
def check_adapter(
    folder: Path,
    model: "PreTrainedModel",
    adapter: Mapping[str, AdapterWeights],
    scale: float,
    sample: Iterable[str] | None = None,
) -> AsPeftReads:
    """Load the folder with PEFT on the model without weights, which stays as it is.

    With `sample` only these layers' changes are computed, and of each its first outputs.
    """
    try:
        wrapped = _load(folder, model)
    except Exception as error:  # of PEFT, whatever it does not support
        return AsPeftReads(float("inf"), "", (f"PEFT does not load it: {first_line(error)}",))
    layers = adapted_layers(wrapped.get_base_model(), model)
    if problems := _other_layers(folder, layers, adapter):
        return AsPeftReads(float("inf"), "", tuple(problems))
    where, worst = "", 0.0
    for name in adapter if sample is None else sample:
        change = Change(adapter[name], scale, stored_transposed(model, name))
        found = _error(layers[name], change, sample is not None)
        if found != found or found > worst:
            where, worst = name, found
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


def _error(layer: Any, change: Change, sample: bool) -> float:
    """Relative error of a layer's change; of a stack, the largest of its experts. NaN if there is one."""
    if len(change.shape) == 2:
        return _of_linear(layer, change, sample)
    if layer.num_experts == 1:
        return _of_linear(layer, change.expert(0), sample)
    left, right, scale = layer.get_delta_factors(_ADAPTER)
    numbers = {0, 1, layer.num_experts - 1} if sample else range(layer.num_experts)
    errors = [_of_expert(left[number], right[number] * scale, change.expert(number), sample) for number in numbers]
    return max(errors, key=lambda error: (error != error, error))


def _of_linear(layer: Any, change: Change, sample: bool) -> float:
    """PEFT computes the change of some outputs at a time: those that it has rows of lora_B for."""
    up, total = layer.lora_B[_ADAPTER], _Total()
    whole = up.weight
    count = max(1, _AT_ONCE // change.weights.da.shape[-1])
    try:
        for first in range(0, count if sample else len(whole), count):
            last = min(first + count, len(whole))
            up.weight = nn.Parameter(whole[first:last], requires_grad=False)
            part = change.outputs(first, last)
            total.add(layer.get_delta_weight(_ADAPTER), part.exact(0, part.shape[0], _CPU))
    finally:
        up.weight = whole
    return total.error()


def _of_expert(left: Tensor, right: Tensor, change: Change, sample: bool) -> float:
    total, count = _Total(), max(1, _AT_ONCE // right.shape[1])
    for first in range(0, count if sample else len(left), count):
        last = min(first + count, len(left))
        total.add(left[first:last] @ right, change.exact(first, last, _CPU))
    return total.error()


class _Total:
    """Relative error of a matrix that is seen some rows at a time."""

    def __init__(self) -> None:
        self.wrong = self.size = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        if found.shape != exact.shape:
            self.wrong = float("inf")
            return
        self.wrong += float((found.double() - exact).square().sum())
        self.size += float(exact.square().sum())

    def error(self) -> float:
        return float((self.wrong / self.size) ** 0.5) if self.size else float(self.wrong**0.5)
