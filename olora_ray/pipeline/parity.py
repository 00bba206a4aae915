"""The verdict on an export: are the adapter folder and the merged folder the trained adapter on its original base?

Two exact checks decide, and need no model in memory:

- each merged weight is base + change, within one rounding, and every other byte of the merged folder's weights is the
  base's (merge.py);
- PEFT adapts exactly our layers when it reads the adapter folder, and each layer's change is ours within 1e-5.

Logits of the three models are compared as well if the model fits in memory. They refuse only a difference that no
rounding explains. Logits alone would be neither sharp nor fair: in bfloat16, one layer left out of 210 changes them
less than the rounding that every model of that precision has.
"""

import copy
import gc
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from olora_ray.adapter.candidates import parameter_of, stored_transposed
from olora_ray.adapter.inject import inject
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.adapter.peft_folder import WEIGHTS, Adapters
from olora_ray.common.errors import first_line
from olora_ray.common.text import some
from olora_ray.model import attention
from olora_ray.model.folder import foreign, text_class
from olora_ray.model.stored import Group
from olora_ray.pipeline.merge import AT_ONCE, Change, Worst, changes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The check of an adapter folder: does PEFT read the layers and the changes that were written? Its verdict counts.


BOUND = 1e-5
"""Largest relative error of a layer's change in PEFT, which computes it in float32."""
_ADAPTER = "default"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class AsPeftReads:
    error: float
    """Largest relative error (Frobenius norm) of a layer's change; in stacks, of an expert's."""
    layer: str
    """The layer with this error."""
    problems: tuple[str, ...]
    """Reasons why PEFT cannot read the folder, or layers that it adapts differently."""

    @property
    def ok(self) -> bool:
        return not self.problems and self.error <= BOUND


@torch.no_grad()
def check_adapter(
    folder: Path,
    model: "PreTrainedModel",
    adapter: Adapters,
    scale: float,
    sample: Iterable[str] | None = None,
) -> AsPeftReads:
    """Load the folder with PEFT on the model without weights, which stays unchanged.

    With `sample`, the changes of these layers alone are computed, and only their first outputs.
    """
    try:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # low_cpu_mem_usage: without it PEFT first fills random matrices, which the folder's then replace.
            wrapped: Any = PeftModel.from_pretrained(
                weightless(model),
                str(folder),
                torch_device="cpu",
                low_cpu_mem_usage=True,
                use_safetensors=True,
            )
    except Exception as error:  # PEFT raises all kinds of errors for what it does not support
        return AsPeftReads(float("inf"), "", (f"PEFT does not load it: {first_line(error)}",))
    layers = adapted_layers(wrapped.get_base_model(), model)
    problems = _other_layers(folder, layers, adapter)
    if problems:
        return AsPeftReads(float("inf"), "", tuple(problems))
    worst = AsPeftReads(0.0, "", ())
    for name in sample or adapter:
        change = Change(adapter[name], scale, stored_transposed(model, name))
        relative = _error(layers[name], change, sample is not None)
        if not relative <= worst.error:
            worst = AsPeftReads(relative, name, ())
        if math.isnan(relative):
            break
    return worst


def adapted_layers(base: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers in a model that it has wrapped, by the names of the layers that they adapt."""
    layers = {}
    for path, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            name = ".".join(part for part in path.split(".") if part != "base_layer")
            parameter = getattr(module, "parameter_name", None)
            stack = parameter is not None and model.get_parameter(f"{name}.{parameter}").ndim == 3
            layers[f"{name}.{parameter}" if stack else name] = module
    return layers


def weightless(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a copy of the model whose parameters are on the CPU and take no memory."""
    # On the CPU, not on meta: PEFT moves an adapter to the device of its parameter.
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            flat = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(flat, requires_grad=False))
    return copied


def _other_layers(folder: Path, layers: Mapping[str, Any], adapter: Adapters) -> list[str]:
    problems = []
    missing = [name for name in adapter if name not in layers]
    if missing:
        problems.append(f"PEFT does not adapt {some(missing)}")
    more = [name for name in layers if name not in adapter]
    if more:
        problems.append(f"PEFT adapts {some(more)}, which the run did not")
    empty = []
    for name, layer in layers.items():
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        if name in adapter and (a.is_meta or b.is_meta):
            empty.append(name)
    if empty:
        problems.append(f"PEFT finds no matrices for {some(empty)}")
    with safe_open(folder / WEIGHTS, "pt") as file:
        spare = len(list(file.keys())) - 2 * len(adapter)
    if spare and not problems:
        kind = "more" if spare > 0 else "fewer"
        problems.append(f"{WEIGHTS} has {abs(spare)} matrices {kind} than the layers need")
    return problems


def _error(layer: Any, change: Change, sample: bool) -> float:
    if len(change.shape) == 2:
        return _relative(_of_linear(layer, change, sample))
    if layer.num_experts == 1:
        return _relative(_of_linear(layer, change.expert(0), sample))
    left, right, scale = layer.get_delta_factors(_ADAPTER)
    numbers = {0, 1, layer.num_experts - 1} if sample else range(layer.num_experts)
    errors = [
        _relative(_of_expert(left[number], right[number] * scale, change.expert(number), sample))
        for number in numbers
    ]
    return float(np.max(errors))  # NaN, if one of them is


Parts = Iterator[tuple[Tensor, Tensor]]
"""Some rows at a time: the change in PEFT, and the trained one."""


def _relative(parts: Parts) -> float:
    wrong = size = 0.0
    for part, exact in parts:
        if part.shape != exact.shape:
            wrong = float("inf")
            continue
        wrong += float((part.double() - exact).square().sum())
        size += float(exact.square().sum())
    if size:
        wrong /= size
    return float(wrong**0.5)


def _of_linear(layer: Any, change: Change, sample: bool) -> Parts:
    # PEFT computes the change of the outputs that lora_B has rows for, so it gets some rows at a time: a whole change
    # in float64 would take several times the memory of the weight.
    up = layer.lora_B[_ADAPTER]
    whole = up.weight
    count = max(1, AT_ONCE // change.weights.da.shape[-1])
    try:
        for first in range(0, count if sample else len(whole), count):
            last = min(first + count, len(whole))
            up.weight = nn.Parameter(whole[first:last], requires_grad=False)
            part = change.outputs(first, last)
            yield layer.get_delta_weight(_ADAPTER), part.exact(0, part.shape[0], _CPU)
    finally:
        up.weight = whole


def _of_expert(left: Tensor, right: Tensor, change: Change, sample: bool) -> Parts:
    count = max(1, AT_ONCE // right.shape[1])
    for first in range(0, count if sample else len(left), count):
        last = min(first + count, len(left))
        yield left[first:last] @ right, change.exact(first, last, _CPU)


# Logits of the adapted, the merged and the PEFT-loaded model side by side, if the model fits in memory.
#
# The checks of the weights cannot see one error: a layer that the model does not call, but whose weight it reads. Its
# adapter took no part in the training, and does in the export. Such an error changes the logits by a good part of the
# adapter's effect.
#
# All logits are computed in float32, whatever precision the weights are stored in. The merge has rounded each weight by
# a known amount, so the merged model is compared with the adapted model whose base weights are moved by that amount.
# Then only the order of sums differs. Its effect is measured on the adapted model: every factor and base weight is
# moved at random by up to half a unit in its last place. The model amplifies this noise as it amplifies other errors.
# A mixture of experts may send a token to another expert if two are equally good, and the noise need not show that.
# Few tokens are concerned, so the median over tokens counts. A difference below a fiftieth of the adapter's effect
# never counts as an error.


MARGIN = 30.0
"""A difference may be at most this many times the measured noise,"""
SHARE = 0.02
"""or this share of the adapter's effect, if that is more."""


@dataclass(frozen=True)
class Difference:
    """The difference of logits from the adapted model's, for the median token, averaged over the vocabulary."""

    median: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.median <= self.bound


@dataclass(frozen=True)
class Logits:
    tokens: int
    largest: float
    """Largest absolute logit of the adapted model."""
    effect: float
    """Average change of the median token's logits by the adapter, with which differences are compared."""
    noise: float
    """Average change of these logits if weights and factors move within their last place."""
    rounding: float | None
    """Their change by the rounding of the merged weights, which is no error; None without a merged folder."""
    merged: Difference | None
    peft: Difference | None
    """None if PEFT's model does not run; then `note` says why."""
    note: str = ""

    def problems(self) -> list[str]:
        lines = []
        for name, item in (("merged model", self.merged), ("adapter loaded by PEFT", self.peft)):
            if item is not None and not item.ok:
                lines.append(
                    f"the logits of the {name} differ from those of the trained model by {item.median:.3g}, more than"
                    f" rounding can explain ({item.bound:.3g})"
                )
        return lines


@dataclass(frozen=True)
class Folders:
    base: Path
    merged: Path | None
    adapter: Path
    trust_remote_code: bool


@torch.no_grad()
def measure_logits(
    folders: Folders,
    model: "PreTrainedModel",
    merged_groups: Sequence[Group],
    adapter: Adapters,
    scale: float,
    batches: Sequence[Tensor],
    device: torch.device,
) -> Logits | str:
    """Compare the models on the tokens of `batches` (B x T each); one model at a time is in memory, in float32.

    Return the reason instead if the adapted model itself cannot run here. `model` is the base without weights. Raises
    UserError if the base runs, but the merged folder does not load.
    """
    load = partial(_load_base, folders=folders, attention=attention.own(model), device=device)
    try:
        ours = _Adapted(load(folders.base), adapter, scale)
        before = ours.logits(batches, on=False)
        reference = ours.logits(batches)
        if folders.merged is not None:
            ours.move(folders.merged, merged_groups, adapter)
        # With base weights moved by the merge's rounding; the reference if there is no merged folder.
        moved = ours.logits(batches)
        ours.shake()
        effect = _median(reference, before)
        noise = _median(moved, ours.logits(batches))
        del ours, before
    except Exception as error:
        # The model's own code failed here, which says nothing about the export.
        return f"the adapted model does not run here: {first_line(error)}"
    if not bool(reference.isfinite().all()):
        return "the adapted model's logits are not finite"
    gc.collect()
    bound = max(MARGIN * noise, SHARE * effect)
    merged = rounding = peft = None
    if folders.merged is not None:
        with foreign("export: the merged model does not run"):
            merged = Difference(_median(moved, _logits(load(folders.merged), batches)), bound)
        rounding = _median(reference, moved)
        gc.collect()
    note = ""
    try:
        from peft import PeftModel

        wrapped: Any = PeftModel.from_pretrained(
            load(folders.base), str(folders.adapter), torch_device=str(device)
        )
        peft = Difference(_median(reference, _logits(wrapped.eval(), batches)), bound)
    except Exception as error:
        # check_adapter has already compared the weights, so this is a note and no problem.
        note = f"PEFT does not run the adapter: {first_line(error)}"
    tokens = sum(batch.numel() for batch in batches)
    largest = float(reference.abs().max())
    return Logits(tokens, largest, effect, noise, rounding, merged, peft, note)


def with_adapter(model: nn.Module, adapter: Adapters, scale: float) -> dict[str, AdaptedWeight]:
    """Put a trained adapter into the model, on its device; return the adapted layers by name."""
    device = next(model.parameters()).device
    factors = {name: weights.factors for name, weights in adapter.items()}
    layers = inject(model, factors, scale)
    for name, layer in layers.items():
        layer.da.data.copy_(adapter[name].da)
        layer.db.data.copy_(adapter[name].db)
        layer.to(device)
    return layers


class _Adapted:
    """The base in float32, with the trained adapter in its layers."""

    def __init__(self, model: "PreTrainedModel", adapter: Adapters, scale: float) -> None:
        self.model: Any = model
        self.scale = scale
        # Looked up before the layers are wrapped, which renames the parameters.
        self.weights = {
            name: model.get_parameter(parameter_of(model, name)).data for name in adapter
        }
        self.wrapped = with_adapter(model, adapter, scale)

    def logits(self, batches: Sequence[Tensor], on: bool = True) -> Tensor:
        for layer in self.wrapped.values():
            layer.scale = self.scale if on else 0.0
        return _logits(self.model, batches)

    def move(self, merged: Path, merged_groups: Sequence[Group], adapter: Adapters) -> None:
        """Move each base weight by the merge's rounding: to merged weight - change."""
        for group, changes in changes_of(merged_groups, adapter, self.scale):
            layers = {parameter: layer for layer, parameter in group.layers.items()}
            for first, last in group.steps():
                numbers = group.read(merged, first, last)
                for parameter, change in changes.items():
                    rows = group.rows(numbers, parameter, first, last)
                    exact = change.exact(first, last, _CPU)
                    self.weights[layers[parameter]][first:last].copy_(rows.double() - exact)

    def shake(self) -> None:
        """Move every adapted weight and factor at random within its last place."""
        generator = torch.Generator().manual_seed(0)
        eps = torch.finfo(torch.float32).eps
        for name, layer in self.wrapped.items():
            for part in (self.weights[name], layer.da.data, layer.db.data, layer.a0, layer.b0):
                if part is not None:
                    noise = torch.rand(part.shape, generator=generator) - 0.5
                    part.mul_((1 + eps * noise).to(part.device))


def _load_base(
    folder: Path, folders: Folders, attention: str, device: torch.device
) -> "PreTrainedModel":
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
    device = next(model.parameters()).device
    parts = [
        model(input_ids=batch.to(device), use_cache=False).logits.float().cpu() for batch in batches
    ]
    return torch.cat([part.flatten(0, -2) for part in parts])


def _median(logits: Tensor, others: Tensor) -> float:
    return float((logits - others).abs_().mean(-1).median())


# The verdict.


@dataclass(frozen=True)
class MergedFolder:
    weights: Worst
    changed: tuple[str, ...]
    """Differences that no adapter explains."""

    def problems(self) -> list[str]:
        lines = [f"merged folder: {line}" for line in self.changed]
        if not self.weights.error <= 1.0:
            lines.append(
                f"the merged weight of {self.weights.layer} is not base + change: the difference is"
                f" {self.weights.error:.3g} times the largest possible rounding error"
            )
        return lines


@dataclass(frozen=True)
class Parity:
    merged: MergedFolder | None
    """None if no merged folder was asked for."""
    peft: AsPeftReads
    logits: Logits | str
    """Or the reason why they were not measured."""

    @property
    def ok(self) -> bool:
        return not self.problems()

    def problems(self) -> list[str]:
        lines = [f"adapter folder: {line}" for line in self.peft.problems]
        if self.merged is not None:
            lines = self.merged.problems() + lines
        if not self.peft.problems and not self.peft.error <= BOUND:
            lines.append(
                f"PEFT computes the change of {self.peft.layer} with a relative error of {self.peft.error:.3g};"
                f" at most {BOUND:g} is allowed"
            )
        # The logits of a folder that is known to be wrong would only repeat it.
        if lines or isinstance(self.logits, str):
            return lines
        return self.logits.problems()

    def in_words(self, quantised: bool = False) -> str:
        """Return the result for a reader of the adapter: the bounds that hold, because figures differ by machine.

        `quantised`: the base model was quantised in the training; the export's is not.
        """
        if not self.ok:
            return "NOT right: do not use this export; parity.json has the errors"
        results = [f"PEFT computes each layer's change with a relative error of at most {BOUND:g}"]
        if self.merged is not None:
            results.append(
                f"each merged weight is base + change, rounded to {self.merged.weights.stored}, and all other weights"
                " are the base model's"
            )
        models = []
        if not isinstance(self.logits, str):
            if self.logits.merged:
                models.append("the merged model")
            if self.logits.peft:
                models.append("the adapter in PEFT")
        if not models:
            return "; ".join([*results, "logits were not compared"])
        theirs = "the trained adapter on the original weights" if quantised else "the training"
        results.append(
            f"the logits of {' and of '.join(models)} equal those of {theirs}, up to rounding errors"
        )
        return "; ".join(results)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}
