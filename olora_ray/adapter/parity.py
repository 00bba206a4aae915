"""The verdict on an export: are adapter folder and merged folder the adapter as trained, on the base as it was?

What decides is exact, and needs no model in memory:

- each merged weight is base + change, within one rounding, and every other byte of the merged folder's weights is the
  base's (adapter/merge_check.py);
- PEFT adapts exactly our layers when it reads the adapter folder, and each one's change is ours within 1e-5
  (adapter/peft_check.py).

Logits of the three models are measured besides where the model fits in memory (adapter/logits.py), and refuse only
what no rounding explains: in bfloat16 a single layer left out of 210 drowns in the rounding that any model of that
precision lives with, so that logits alone are neither sharp nor fair.
"""

import copy
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from olora_ray.adapter import stored
from olora_ray.adapter.candidates import stored_transposed
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.logits import Logits
from olora_ray.adapter.merge import Change, Worst
from olora_ray.adapter.peft_folder import WEIGHTS
from olora_ray.adapter.stored import DTYPES, Group, Stored, follow
from olora_ray.common.errors import UserError, first_line
from olora_ray.model import folder as misfits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whether PEFT reads an adapter folder as the layers and the changes that it was written from: this decides.


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


@dataclass(frozen=True)
class MergedFolder:
    """What the files of a merged folder say."""

    weights: Worst
    changed: tuple[str, ...]
    """What else of them is not the base's."""

    def problems(self) -> list[str]:
        """One line for each thing that is wrong."""
        found = [f"merged folder: {line}" for line in self.changed]
        if not self.weights.error <= 1.0:
            found.append(
                f"the merged weight of {self.weights.layer} is {self.weights.error:.3g} roundings from base + change;"
                " at most 1 is right"
            )
        return found


@dataclass(frozen=True)
class Parity:
    """Result of all comparisons."""

    merged: MergedFolder | None
    """None if no merged folder was wanted."""
    peft: AsPeftReads
    logits: Logits | str
    """Or why they were not measured."""

    @property
    def ok(self) -> bool:
        """Whether the export is right."""
        return not self.problems()

    def problems(self) -> list[str]:
        """One line for each comparison that is over its bound."""
        found = [] if self.merged is None else self.merged.problems()
        found += [f"adapter folder: {line}" for line in self.peft.problems]
        if not self.peft.problems and not self.peft.error <= BOUND:
            found.append(
                f"the change of {self.peft.layer} is off by {self.peft.error:.3g} of its size as PEFT computes it;"
                f" at most {BOUND:g} is right"
            )
        # Logits of a folder that is known to be wrong say nothing more.
        return found or ([] if isinstance(self.logits, str) else self.logits.problems())

    def in_words(self, quantised: bool = False) -> str:
        """What was found, for a reader of the adapter: bounds that are kept, since figures differ by machine.

        `quantised`: the training had its base quantised, which no export has.
        """
        if not self.ok:
            return "NOT right, see parity.json; do not use it"
        found = [f"PEFT computes each layer's change within {BOUND:g} of its size"]
        if self.merged is not None:
            found.append(
                f"each merged weight is base + change within one rounding to {self.merged.weights.stored}, and all"
                " others are the base's"
            )
        return "; ".join([*found, _logits_in_words(self.logits, quantised)])

    def to_json(self) -> dict[str, Any]:
        """The content of parity.json."""
        return {**asdict(self), "ok": self.ok}


def _logits_in_words(logits: Logits | str, quantised: bool) -> str:
    if isinstance(logits, str):
        return "logits were not compared"
    models = [
        name for name, item in (("the merged model", logits.merged), ("the adapter in PEFT", logits.peft)) if item
    ]
    if not models:
        return "logits were not compared"
    theirs = "the trained adapter on the original weights" if quantised else "the training"
    return f"the logits of {' and of '.join(models)} are those of {theirs} but for rounding"


# Whether the stored tensors of a model folder are those of the model that its config describes.


@dataclass(frozen=True)
class Fit:
    """What of a folder's tensors does not fit its config."""

    problem: str | None
    """Why the model would be another than the files hold, to follow "FOLDER "; None if that is not known."""
    left_out: tuple[str, ...]
    """Tensors that the model has no place for: of layers that predict further tokens, of a part that sees."""


def look(folder: Path, model: "PreTrainedModel") -> Fit:
    """Compare the headers of a folder with the model without weights; of a quantised one nothing is known here."""
    if getattr(model.config, "quantization_config", None) is not None:
        return Fit(None, ())
    try:
        places = stored.tensors(folder)
        groups, unread = follow(places, model)
    except (UserError, AttributeError, ImportError, KeyError, TypeError):  # loading says what is wrong
        return Fit(None, ())
    ignored = _ignored(model)
    left_out = {name: key for name, key in unread.items() if not ignored.search(key)}
    problem = _packed(groups, model) or _biased(folder, places, left_out, model)
    return Fit(problem, tuple(left_out))


def _ignored(model: Any) -> re.Pattern[str]:
    """Names that transformers leaves out with good reason (PreTrainedModel._adjust_missing_and_unexpected_keys)."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))


def _packed(groups: Mapping[str, Group], model: "PreTrainedModel") -> str | None:
    for name, parameter in model.named_parameters():
        entries = groups[name].stored if name in groups and parameter.is_floating_point() else []
        if odd := next((entry for entry in entries if entry.dtype not in DTYPES), None):
            return misfits.packed(odd.name, odd.dtype)
    return None


def _biased(
    folder: Path, places: Mapping[str, Stored], left_out: Mapping[str, str], model: "PreTrainedModel"
) -> str | None:
    """What is wrong with a bias other than zero of a layer that has none by the config."""
    for name, key in left_out.items():
        entry = places[name]
        if misfits.is_bias(model, key) and entry.dtype in DTYPES and bool(entry.read(folder).any()):
            return misfits.bias(model, name)
    return None


# How much memory is free for a model that is to be loaded besides.


SHARE = 0.4
"""Share of the free memory that a model may take which is loaded to measure something."""
ON_THE_WAY = 0.8
"""Share of a node's free memory that a model may take which goes on to a GPU: nothing more is made of it there."""
_PROC, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def too_large(parameters: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a model of so many parameters is not to be loaded on the device, or None."""
    need, where = parameters * dtype.itemsize, None
    if need > SHARE * free(device):
        where = f"the memory of one {device.type}"
    elif device != _CPU and need > ON_THE_WAY * free(_CPU):
        where = f"the memory of the node, by which it comes to the {device.type}"
    if where is None:
        return None
    kind = str(dtype).removeprefix("torch.")
    return f"in {kind} the model has {need / 2**30:.1f} GiB, too large for {where}"


def free(device: torch.device) -> int:
    """Bytes that are free on the device; of a CPU, what the machine has and a container's limit leaves."""
    if device.type == "cuda":
        # What torch keeps of memory that it has given up counts as used, and is taken first.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    found = _of_machine()
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # The cache of files counts as used, and is given up when it is asked for.
        cached = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        found = min(found, limit - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return max(found, 0)


def _of_machine() -> int:
    if not _PROC.is_file():  # not Linux: half of the memory is a guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    sizes = dict(line.split(":", 1) for line in _PROC.read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) * 1024
