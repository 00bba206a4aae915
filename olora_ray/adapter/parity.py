"""Parity of the adapted model, the merged folder and the adapter folder: measured, with bounds.

Two kinds of checks, on the base loaded three times, one model in memory at a time.

**Logits** on given tokens: of base + AdaptedLinear (as trained), of the merged folder loaded by transformers,
and of the adapter folder loaded by PEFT on the base. They cannot be equal: merging rounds each
weight once to the precision it is stored in, and sums are taken in another order. How much of a
difference that explains is measured: the adapted model again, with each adapted weight of the base
moved at random by up to half a unit in its last place (of the stored or the computing precision,
whichever is coarser). Bounds: 3 times the mean of this noise, and 10 times its largest value, which is
the luck of one logit among millions (observed: up to 1.6 and 4.9 times). A merged model may lose some of the
adapter's effect as well, 5 % in bfloat16: a base weight lies on the grid of its precision, so a change of less
than half a unit is rounded away, and what is lost has a direction, unlike noise (observed: 4.3 % after 12 steps).

SmolLM2-135M, OLoRA r 16 on all 210 linear layers, 30 steps at 3e-4, 115 tokens, logits up to 51,
mean change of a logit by the adapter 7.0 (mean differences of logits):

    stored    computed   noise     merged    peft     scale 2 % wrong   scale halved
    float32   float32    8.0e-6    8.6e-6    0        0.112             2.8
    bfloat16  float32    0.047     0.038     0        0.125             2.8
    bfloat16  bfloat16   0.140     0.163     0.133    0.164             2.7

So in bfloat16 logits catch a gross error only: one layer left out of 210 (0.061 in the second row, 0.161
in the third) drowns in the rounding that any bfloat16 model lives with. Therefore also

**Weights**, in every precision: each merged weight against W + s (B A - B0 A0) in float64, in units
of one rounding (bound 1), and each layer's change as PEFT computes it, relative to its norm (bound
1e-5). These catch a single layer, a wrong scale or a lost alpha whatever the precision.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from olora_ray.adapter.export import stored_weights
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.inject import inject
from olora_ray.adapter.layer import is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEAN_MARGIN, MAX_MARGIN = 3.0, 10.0
"""The mean and the largest difference of logits may be this many times the measured noise."""
LOST = 6.4
"""Units in the last place, relative to 1, that the mean effect of the adapter may lose in the merge."""
PEFT_WEIGHTS_BOUND = 1e-5
"""Relative error of a layer's change in PEFT, which computes it in float32."""


@dataclass(frozen=True)
class Difference:
    """Absolute differences of logits from the adapted model's, and what rounding explains."""

    max: float
    mean: float
    bound_max: float
    bound_mean: float

    @property
    def ok(self) -> bool:
        """Whether both are within their bounds (False for NaN)."""
        return self.max <= self.bound_max and self.mean <= self.bound_mean


@dataclass(frozen=True)
class Parity:
    """Result of a comparison of all three."""

    dtype: str
    """Precision of the computation."""
    stored: str
    """Precision of the merged weights."""
    tokens: int
    logits_max: float
    """Largest absolute logit of the adapted model."""
    effect: float
    """Mean absolute change of a logit by the adapter: what a difference is to be seen against."""
    merged: Difference
    peft: Difference
    merged_weights: float
    """Largest error of a merged weight, in roundings to `stored`; at most 1."""
    peft_weights: float
    """Largest relative error of a layer's change as PEFT computes it; infinite if PEFT adapts other layers."""

    @property
    def ok(self) -> bool:
        """Whether every comparison is within its bound."""
        return not self.problems()

    def problems(self) -> list[str]:
        """One line for each comparison that is over its bound."""
        found = []
        for name, item in (("merged model", self.merged), ("adapter loaded by PEFT", self.peft)):
            if not item.ok:
                found.append(
                    f"logits of the {name} differ from the adapted model's by {item.mean:.3g} on average and"
                    f" {item.max:.3g} at most; rounding explains {item.bound_mean:.3g} and {item.bound_max:.3g}"
                )
        if not self.merged_weights <= 1.0:
            found.append(
                f"a merged weight is {self.merged_weights:.3g} roundings from base + change; at most 1 is right"
            )
        if not self.peft_weights <= PEFT_WEIGHTS_BOUND:
            found.append(
                f"a layer's change in PEFT is off by {self.peft_weights:.3g}; at most {PEFT_WEIGHTS_BOUND} is right"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values for parity.json."""
        return {"ok": self.ok, "problems": self.problems(), **asdict(self)}


def measure_parity(
    base: Path,
    adapter: Mapping[str, AdapterWeights],
    scale: float,
    merged: Path,
    plain: Path,
    batches: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Parity:
    """Compare `merged` (from export.write_merged) and `plain` (from export.write_adapter) with the adapted base.

    `batches` are token ids (rows x tokens) without padding; 200 to 500 tokens are plenty, and logits
    take tokens x vocabulary x 4 bytes, a few times. float32 is the sharpest; bfloat16 halves the memory.
    """
    device = device or torch.device("cpu")

    def load(folder: Path) -> "PreTrainedModel":
        return _load(folder, dtype, device, trust_remote_code)

    model = load(base)
    transposed = frozenset(name for name in adapter if is_transposed(model.get_submodule(name)))
    merged_weights, stored = _merged_error(base, merged, adapter, scale, transposed)
    before = _logits(model, batches)
    adapted = _adapt(model, adapter, scale)
    reference = _logits(model, batches)
    effect = float((reference - before).abs().mean())
    bounds = {}
    coarser = max(_eps(dtype), _eps(stored))
    for eps in {_eps(dtype), coarser}:
        with _rounded_again(adapted, eps):
            bounds[eps] = _difference(reference, _logits(model, batches))
    del model, adapted, before
    gc.collect()

    of_merged = _difference(reference, _logits(load(merged), batches))
    gc.collect()
    peft_model = _with_peft(load(base), plain, device)
    of_peft = _difference(reference, _logits(peft_model, batches))
    return Parity(
        dtype=str(dtype).removeprefix("torch."),
        stored=str(stored).removeprefix("torch."),
        tokens=sum(batch.numel() for batch in batches),
        logits_max=float(reference.abs().max()),
        effect=effect,
        merged=_bounded(of_merged, bounds[coarser], lost=LOST * coarser * effect),
        peft=_bounded(of_peft, bounds[_eps(dtype)]),
        merged_weights=merged_weights,
        peft_weights=_peft_error(peft_model, adapter, scale),
    )


def exact_delta(weights: AdapterWeights, scale: float) -> Tensor:
    """s (B A - B0 A0), m x n, in float64: the paper's form, independent of how the export computes it."""
    a0, da, db = weights.factors.a0.double(), weights.da.double(), weights.db.double()
    b0 = torch.zeros_like(db) if weights.factors.b0 is None else weights.factors.b0.double()
    return scale * ((b0 + db) @ (a0 + da) - b0 @ a0)


def _load(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    # One attention implementation for all: it is not what is compared.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", trust_remote_code=trust_remote_code, use_safetensors=True
    )
    model.to(device).eval()
    loaded: PreTrainedModel = model
    return loaded


def _adapt(model: nn.Module, adapter: Mapping[str, AdapterWeights], scale: float) -> dict[str, nn.Module]:
    """Inject the adapter as trained; returns the base layers that it wraps."""
    device = next(model.parameters()).device
    wrapped = inject(model, {name: weights.factors for name, weights in adapter.items()}, scale)
    for name, layer in wrapped.items():
        layer.da.data.copy_(adapter[name].da)
        layer.db.data.copy_(adapter[name].db)
        layer.to(device)
    return {name: layer.base for name, layer in wrapped.items()}


def _with_peft(model: "PreTrainedModel", plain: Path, device: torch.device) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(plain), torch_device=str(device)).eval()


@torch.inference_mode()
def _logits(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """Logits of all tokens, (tokens x vocabulary), float32 on the CPU."""
    device = next(model.parameters()).device
    parts = [model(input_ids=batch.to(device), use_cache=False).logits.float().cpu() for batch in batches]
    return torch.cat([part.flatten(0, -2) for part in parts])


def _difference(reference: Tensor, other: Tensor) -> tuple[float, float]:
    gap = (reference - other).abs_()
    return float(gap.max()), float(gap.mean())


def _bounded(difference: tuple[float, float], noise: tuple[float, float], lost: float = 0.0) -> Difference:
    return Difference(*difference, MAX_MARGIN * noise[0], MEAN_MARGIN * noise[1] + lost)


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


@contextmanager
def _rounded_again(layers: Mapping[str, nn.Module], eps: float) -> Iterator[None]:
    """In a forward pass, each layer's weight is moved by up to eps / 2 of its value; one at a time in memory."""
    generator = torch.Generator().manual_seed(0)
    handles = []
    for layer in layers.values():
        before, after = _weight_hooks(eps, generator)
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight_hooks(eps: float, generator: torch.Generator) -> tuple[Callable[..., None], Callable[..., None]]:
    kept: list[nn.Parameter] = []

    def before(layer: Any, _input: object) -> None:
        kept.append(layer.weight)
        weight = layer.weight.detach()
        move = (torch.rand(weight.shape, generator=generator) - 0.5).to(weight.device)
        moved = (weight.float() * (1 + eps * move)).to(weight.dtype)
        layer.weight = nn.Parameter(moved, requires_grad=False)

    def after(layer: Any, _input: object, _output: object) -> None:
        layer.weight = kept.pop()

    return before, after


@torch.inference_mode()
def _merged_error(
    base: Path, merged: Path, adapter: Mapping[str, AdapterWeights], scale: float, transposed: frozenset[str]
) -> tuple[float, torch.dtype]:
    """Largest error of a merged weight in roundings, and the coarsest precision that one is stored in."""
    worst, stored = 0.0, torch.float32
    for module, (file, name) in stored_weights(base, adapter).items():
        with safe_open(base / file, "pt") as old, safe_open(merged / file, "pt") as new:
            weight, found = old.get_tensor(name).double(), new.get_tensor(name)
        delta = exact_delta(adapter[module], scale).cpu()
        exact = weight + (delta.T if module in transposed else delta)
        kind = torch.finfo(found.dtype)
        # One rounding to the stored precision, and the few in float32 that come before it.
        allowed = kind.eps / 2 * exact.abs() + 1e-6 * (weight.abs() + delta.abs().max()) + kind.tiny * kind.eps
        worst = max(worst, float(((found.double() - exact).abs() / allowed).max()))
        stored = max(stored, found.dtype, key=_eps)
    return worst, stored


@torch.inference_mode()
def _peft_error(model: Any, adapter: Mapping[str, AdapterWeights], scale: float) -> float:
    """Largest relative error (Frobenius norm) of a layer's change as PEFT computes it."""
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    if set(layers) != set(adapter):
        return float("inf")
    worst = 0.0
    for name, layer in layers.items():
        found = layer.get_delta_weight("default").double().cpu()
        exact = exact_delta(adapter[name], scale).cpu()
        exact = exact.T if is_transposed(layer.base_layer) else exact
        size = float(exact.norm())
        worst = max(worst, float((found - exact).norm()) / size if size else float(found.norm()))
    return worst
