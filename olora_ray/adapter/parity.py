"""The verdict on an export: are adapter folder and merged folder the adapter as trained, on the base as it was?

What decides is exact, and needs no model in memory:

- each merged weight is base + change, within one rounding, and every other byte of the merged folder's weights is the
  base's (adapter/merge.py);
- PEFT adapts exactly our layers when it reads the adapter folder, and each one's change is ours within 1e-5.

Logits of the three models are measured besides where the model fits in memory, and refuse only what no
rounding explains: in bfloat16 a single layer left out of 210 drowns in the rounding that any model of that
precision lives with, so that logits alone are neither sharp nor fair.
"""

import copy
import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from olora_ray.adapter.candidates import parameter_of, stored_transposed
from olora_ray.adapter.inject import inject
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.merge import AT_ONCE, Change, Worst, changes_of
from olora_ray.adapter.peft_folder import WEIGHTS
from olora_ray.adapter.stored import Group
from olora_ray.common.errors import first_line
from olora_ray.model import attention
from olora_ray.model.folder import foreign, text_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whether PEFT reads an adapter folder as the layers and the changes that it was written from: this decides.


BOUND = 1e-5
"""Relative error of a layer's change in PEFT, which computes it in float32."""
_ADAPTER = "default"
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
    count = max(1, AT_ONCE // change.weights.da.shape[-1])
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
    total, count = _Total(), max(1, AT_ONCE // right.shape[1])
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


# Logits of the adapted, the merged and the PEFT-loaded model side by side, where the model fits in memory.
#
# The weights decide whether an export is right . Logits add what these
# cannot see: a layer that the model does not call, but whose weight it reads, so that its adapter took no part in the
# training and does in the export. Such an error changes logits by a good part of the adapter's effect.
#
# All is computed in float32, whatever the weights are stored in. The merge has rounded each weight, by a known amount:
# the merged model is compared with the adapted one whose base weights are moved by just that. So nothing is left but
# the order of sums, whose size is measured: the same model once more, every factor and base weight moved at random by
# up to half a unit in its last place. That noise is the model's own: what amplifies an error in one amplifies it in the
# other. A mixture of experts may send a token to another expert where two are as good, which no noise need show; it is
# few tokens, and so the median over tokens counts. A difference below a fiftieth of the effect of the adapter is never
# taken for such an error.


MARGIN = 30.0
"""A difference may be this many times the measured noise."""
SHARE = 0.02
"""Or this share of the adapter's effect."""


@dataclass(frozen=True)
class Difference:
    """Differences of logits from the adapted model's: of the median token, on average over the vocabulary."""

    median: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether it is within its bound (False for NaN)."""
        return self.median <= self.bound


@dataclass(frozen=True)
class Logits:
    """What the models say to the same tokens."""

    tokens: int
    largest: float
    """Largest absolute logit of the adapted model."""
    effect: float
    """Change of the median token's logits by the adapter, on average: what a difference is to be seen against."""
    noise: float
    """Change of these by moving weights and factors within their last place."""
    rounding: float | None
    """Change of these by the rounding of the merged weights, which is no error; None without a merged folder."""
    merged: Difference | None
    peft: Difference | None
    """None if PEFT's model does not run, which `note` tells."""
    note: str = ""

    def problems(self) -> list[str]:
        """One line for each difference that rounding does not explain."""
        found = []
        for name, item in (("merged model", self.merged), ("adapter loaded by PEFT", self.peft)):
            if item is not None and not item.ok:
                found.append(
                    f"logits of the {name} differ from the adapted model's by {item.median:.3g};"
                    f" rounding explains {item.bound:.3g}"
                )
        return found


@dataclass(frozen=True)
class Folders:
    """What is compared."""

    base: Path
    merged: Path | None
    adapter: Path
    trust_remote_code: bool


@torch.no_grad()
def measure_logits(
    folders: Folders,
    model: "PreTrainedModel",
    found: Sequence[Group],
    adapter: Mapping[str, AdapterWeights],
    scale: float,
    batches: Sequence[Tensor],
    device: torch.device,
) -> Logits | str:
    """Compare the models on the tokens of `batches` (B x T each); one of them is in memory at a time, in float32.

    Returns why not if the adapted model itself cannot be run here. `model` is the base without weights. Raises
    UserError if the base runs, and the merged folder does not load.
    """
    load = partial(_load_base, folders=folders, attention=attention.own(model), device=device)
    try:
        own = _own(_Adapted(load(folders.base), adapter, scale), folders.merged, found, adapter, batches)
    except Exception as error:  # of the model's own code: what it cannot do here says nothing of the export
        return f"the adapted model does not run here: {first_line(error)}"
    if not bool(own.reference.isfinite().all()):
        return "the adapted model's logits are not finite"
    gc.collect()
    bound, merged = max(MARGIN * own.noise, SHARE * own.effect), None
    if folders.merged is not None:
        with foreign("export: the merged model does not run"):
            merged = Difference(_median(own.moved, _logits(load(folders.merged), batches)), bound)
        gc.collect()
    peft, note = None, ""
    try:
        from peft import PeftModel

        wrapped: Any = PeftModel.from_pretrained(load(folders.base), str(folders.adapter), torch_device=str(device))
        theirs = _logits(wrapped.eval(), batches)
        peft = Difference(_median(own.reference, theirs), bound)
    except Exception as error:  # what PEFT does not run it has read all the same
        note = f"PEFT does not run the adapter: {first_line(error)}"
    return Logits(
        tokens=sum(batch.numel() for batch in batches),
        largest=float(own.reference.abs().max()),
        effect=own.effect,
        noise=own.noise,
        rounding=None if merged is None else _median(own.reference, own.moved),
        merged=merged,
        peft=peft,
        note=note,
    )


@dataclass(frozen=True)
class _Own:
    """What the adapted model says."""

    reference: Tensor
    moved: Tensor
    """With the rounding of the merge in its base weights; the reference without a merged folder."""
    effect: float
    noise: float


def _own(
    ours: "_Adapted",
    merged: Path | None,
    found: Sequence[Group],
    adapter: Mapping[str, AdapterWeights],
    batches: Sequence[Tensor],
) -> _Own:
    before, reference = ours.logits(batches, on=False), ours.logits(batches)
    if merged is not None:
        ours.move(merged, found, adapter)
    moved = ours.logits(batches)
    ours.shake()
    return _Own(reference, moved, _median(reference, before), _median(moved, ours.logits(batches)))


class _Adapted:
    """The base in float32 with the adapter as trained in its layers."""

    def __init__(self, model: "PreTrainedModel", adapter: Mapping[str, AdapterWeights], scale: float) -> None:
        self.model: Any = model
        self.scale = scale
        # Before they are wrapped: afterwards they go by other names.
        self.weights = {name: model.get_parameter(parameter_of(model, name)).data for name in adapter}
        device = next(model.parameters()).device
        self.wrapped = inject(model, {name: weights.factors for name, weights in adapter.items()}, scale)
        for name, layer in self.wrapped.items():
            layer.da.data.copy_(adapter[name].da)
            layer.db.data.copy_(adapter[name].db)
            layer.to(device)

    def logits(self, batches: Sequence[Tensor], on: bool = True) -> Tensor:
        """With the adapter, or without its effect."""
        for layer in self.wrapped.values():
            layer.scale = self.scale if on else 0.0
        return _logits(self.model, batches)

    def move(self, merged: Path, found: Sequence[Group], adapter: Mapping[str, AdapterWeights]) -> None:
        """Move each base weight by what the merge has rounded: to merged weight - change."""
        for group, changes in changes_of(found, adapter, self.scale):
            layers = {parameter: layer for layer, parameter in group.layers.items()}
            for first, last in group.steps():
                numbers = group.read(merged, first, last)
                for parameter, change in changes.items():
                    rows = group.rows(numbers, parameter, first, last)
                    exact = change.exact(first, last, torch.device("cpu"))
                    self.weights[layers[parameter]][first:last].copy_(rows.double() - exact)

    def shake(self) -> None:
        """Move every adapted weight and factor at random within its last place."""
        generator = torch.Generator().manual_seed(0)
        eps = torch.finfo(torch.float32).eps
        for name, layer in self.wrapped.items():
            for part in (self.weights[name], layer.da.data, layer.db.data, layer.a0, layer.b0):
                if part is not None:
                    part.mul_((1 + eps * (torch.rand(part.shape, generator=generator) - 0.5)).to(part.device))


def _load_base(folder: Path, folders: Folders, attention: str, device: torch.device) -> "PreTrainedModel":
    model: Any = text_class(folder).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        trust_remote_code=folders.trust_remote_code,
        use_safetensors=True,
    )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _logits(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """Logits of all tokens, (tokens x vocabulary), float32 on the CPU."""
    device = next(model.parameters()).device
    parts = [model(input_ids=batch.to(device), use_cache=False).logits.float().cpu() for batch in batches]
    return torch.cat([part.flatten(0, -2) for part in parts])


def _median(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs_().mean(-1).median())


# The verdict.


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
    compared = (
        {} if isinstance(logits, str) else {"the merged model": logits.merged, "the adapter in PEFT": logits.peft}
    )
    models = [name for name, item in compared.items() if item]
    if not models:
        return "logits were not compared"
    theirs = "the trained adapter on the original weights" if quantised else "the training"
    return f"the logits of {' and of '.join(models)} are those of {theirs} but for rounding"
