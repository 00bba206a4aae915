"""Logits of the adapted, the merged and the PEFT-loaded model side by side, where the model fits in memory.

The weights decide whether an export is right (adapter/merge_check.py, adapter/peft_check.py). Logits add what these
cannot see: a layer that the model does not call, but whose weight it reads, so that its adapter took no part in the
training and does in the export. Such an error changes logits by a good part of the adapter's effect.

All is computed in float32, whatever the weights are stored in. The merge has rounded each weight, by a known amount:
the merged model is compared with the adapted one whose base weights are moved by just that. So nothing is left but
the order of sums, whose size is measured: the same model once more, every factor and base weight moved at random by up
to half a unit in its last place. That noise is the model's own: what amplifies an error in one amplifies it in the
other. A mixture of experts may send a token to another expert where two are as good, which no noise need show; it is
few tokens, and so the median over tokens counts. A difference below a fiftieth of the effect of the adapter is never
taken for such an error.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olora_ray.adapter.candidates import parameter_of
from olora_ray.adapter.inject import inject
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.merge import changes_of
from olora_ray.adapter.stored import Group
from olora_ray.common.errors import first_line
from olora_ray.model.folder import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    load = partial(_load, folders=folders, attention=attention_of(model), device=device)
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
        theirs = _logits(_with_peft(load(folders.base), folders.adapter), batches)
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


def attention_of(model: "PreTrainedModel") -> str:
    """The attention in which logits are compared: that of the family's own code that every device has."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


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


def _load(folder: Path, folders: Folders, attention: str, device: torch.device) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        trust_remote_code=folders.trust_remote_code,
        use_safetensors=True,
    )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _with_peft(base: "PreTrainedModel", adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter), torch_device=str(base.device)).eval()


def _logits(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """Logits of all tokens, (tokens x vocabulary), float32 on the CPU."""
    device = next(model.parameters()).device
    parts = [model(input_ids=batch.to(device), use_cache=False).logits.float().cpu() for batch in batches]
    return torch.cat([part.flatten(0, -2) for part in parts])


def _median(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs_().mean(-1).median())
