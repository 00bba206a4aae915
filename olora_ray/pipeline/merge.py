"""The merged folder: the base's files, with W + s (dB A0 + (B0 + dB) dA) in place of each adapted weight W.

Each change is computed in float32 and added with one rounding to the precision in which W is stored. The folder has the
base's layout: each weight file is copied, and only the bytes of adapted weights are overwritten, so that every other
byte is the base's. Memory holds one weight at a time, or a few experts of a stack, whatever the size of a file or of
the model.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from olora_ray.adapter.candidates import stored_transposed
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.peft_folder import Adapters, replacing
from olora_ray.common.errors import UserError
from olora_ray.common.fault_points import reached
from olora_ray.model.folder import INDEX
from olora_ray.model.stored import Group, groups, is_stale_index, tensors, weight_files
from olora_ray.pipeline import model_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The change of a parameter by its adapter, in the parameter's own layout, some rows at a time.
#
# A parameter is m x n, or n x m if it is stored transposed (GPT-2's Conv1D); a stack of experts is E x m x n, or
# E x n x m. Rows are indices of the first dimension; for a stack they are experts.


UNIT = torch.finfo(torch.float32).eps / 2
"""Relative error of one rounding in float32."""


@dataclass(frozen=True)
class Change:
    weights: AdapterWeights
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, m, _ = self.weights.db.shape
        n = self.weights.da.shape[-1]
        if self.transposed:
            return (*experts, n, m)
        return (*experts, m, n)

    def expert(self, number: int) -> "Change":
        return replace(self, weights=_each(self.weights, lambda a: a[number], lambda b: b[number]))

    def outputs(self, first: int, last: int) -> "Change":
        return replace(self, weights=_each(self.weights, lambda a: a, lambda b: b[first:last]))

    def merged(self, first: int, last: int, device: torch.device) -> Tensor:
        """Return rows first..last in float32: the numbers that are added to the base."""
        return self._turned(self._part(first, last, device, torch.float32).delta(self.scale))

    def exact(self, first: int, last: int, device: torch.device) -> Tensor:
        """Return rows first..last in float64 by the paper's form s (B A - B0 A0): it shares no step with `merged`."""
        part = self._part(first, last, device, torch.float64)
        a0 = part.factors.a0
        b0 = part.factors.b0
        if b0 is None:
            b0 = torch.zeros_like(part.db)
        return self._turned(self.scale * ((b0 + part.db) @ (a0 + part.da) - b0 @ a0))

    def slack(self, first: int, last: int, device: torch.device) -> Tensor:
        """Return the largest error of `merged` that float32 explains: (k + 6) u |B| |A| for an inner dimension of k.

        Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.5: holds for any order of the sums.
        """
        part = self._part(first, last, device, torch.float32)
        a0 = part.factors.a0.abs()
        b = db = part.db.abs()
        if part.factors.b0 is not None:
            b = part.factors.b0.abs() + db
        terms = 2 * part.da.shape[-2] + 6
        return self._turned(abs(self.scale) * terms * UNIT * (db @ a0 + b @ part.da.abs()))

    def _turned(self, change: Tensor) -> Tensor:
        return change.mT if self.transposed else change

    def _part(
        self, first: int, last: int, device: torch.device, dtype: torch.dtype
    ) -> AdapterWeights:
        stack = self.weights.da.ndim == 3

        def a_part(a: Tensor) -> Tensor:
            if stack:
                a = a[first:last]
            elif self.transposed:
                a = a[:, first:last]
            return a.to(device).to(dtype)

        def b_part(b: Tensor) -> Tensor:
            if stack or not self.transposed:
                b = b[first:last]
            return b.to(device).to(dtype)

        return _each(self.weights, a_part, b_part)


def _each(
    weights: AdapterWeights,
    a_part: Callable[[Tensor], Tensor],
    b_part: Callable[[Tensor], Tensor],
) -> AdapterWeights:
    start = weights.factors
    b0 = start.b0
    if b0 is not None:
        b0 = b_part(b0)
    factors = replace(start, a0=a_part(start.a0), b0=b0)
    return AdapterWeights(factors, a_part(weights.da), b_part(weights.db))


# Writing a merged folder.


# Files that are not copied: weights in other formats would be the base's, and its model card describes another model.
_LEFT_OUT = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    "README.md",
)
_CPU = torch.device("cpu")


def write_merged(
    base: Path,
    adapter: Adapters,
    scale: float,
    out: Path,
    model: "PreTrainedModel",
) -> None:
    """Write the base folder with the adapter merged into its weights; replaces `out` when complete.

    `base` has config.json, safetensors (one file, or shards with an index) and tokenizer files. Everything is copied
    except weights in other formats and the model card. `model` is the model without weights. Raises UserError if `base`
    has no safetensors, or if an adapted weight is stored not exactly once, is tied, has another shape or is not
    floating point.
    """
    merged_groups = groups(base, model, adapter)
    changes_of(merged_groups, adapter, scale)
    with replacing(out) as folder:
        copy_files(base, folder)
        merge(base, folder, merged_groups, adapter, scale)


def copy_files(base: Path, folder: Path) -> None:
    """Copy the base's files into a merged folder: weights unchanged, config and tokenizer in portable form."""
    for entry in base.iterdir():
        left_out = (
            entry.name.endswith(_LEFT_OUT)
            or entry.name.startswith(".")
            or is_stale_index(base, entry.name)
        )
        if entry.is_file() and not left_out:
            shutil.copyfile(entry, folder / entry.name)
        elif entry.is_dir() and entry.name == model_files.TEMPLATES:
            shutil.copytree(entry, folder / entry.name, copy_function=shutil.copyfile)
    model_files.make_portable(folder)
    for name in weight_files(base):
        shutil.copyfile(base / name, folder / name)


@torch.inference_mode()
def merge(
    base: Path,
    folder: Path,
    share: Sequence[Group],
    adapter: Adapters,
    scale: float,
    device: torch.device = _CPU,
) -> None:
    """Write the merged weights of these groups into the copies of the base's files in `folder`."""
    reached("export")
    for group, changes in changes_of(share, adapter, scale):
        for first, last in group.steps():
            numbers = group.read(base, first, last)
            wide = torch.promote_types(numbers.dtype, torch.float32)
            for parameter, change in changes.items():
                weight = group.rows(numbers, parameter, first, last).to(device).to(wide)
                merged = (weight + change.merged(first, last, device)).to(numbers.dtype).cpu()
                group.put(numbers, parameter, merged, first, last)
            group.write(folder, numbers, first, last)


def changes_of(
    share: Sequence[Group], adapter: Adapters, scale: float
) -> list[tuple[Group, dict[str, Change]]]:
    group_changes = []
    for group in share:
        changes = {
            parameter: Change(adapter[layer], scale, stored_transposed(group.model, layer))
            for layer, parameter in group.layers.items()
        }
        for parameter, change in changes.items():
            if group.shapes[parameter] != change.shape:
                raise UserError(
                    f"cannot merge {parameter}: its shape is {group.shapes[parameter]}, but its shape in the adapter is"
                    f" {change.shape}"
                )
        group_changes.append((group, changes))
    return group_changes


# The check of a merged folder: is it the base plus the change? It reads the files alone, and its verdict counts.


AT_ONCE = 2**20
"""Numbers compared at once: in float64 they fit in a processor's cache."""
_EXPONENT = 0x7FF0000000000000
"""The exponent bits of a float64; alone they are the number rounded down to a power of two."""
_OF_ENDS = (model_files.ENDS, "bos_token_id", "pad_token_id")
"""Fields that an export may write into generation_config.json."""


@dataclass(frozen=True)
class Worst:
    error: float
    """Unit: roundings to the stored precision."""
    layer: str
    stored: str
    """The coarsest precision in which one of the weights is stored."""


@torch.inference_mode()
def check_weights(
    base: Path,
    merged: Path,
    share: Sequence[Group],
    adapter: Adapters,
    scale: float,
    device: torch.device = _CPU,
) -> Worst:
    errors = [Worst(0.0, "", "float32")]
    for group, changes in changes_of(share, adapter, scale):
        stored = str(group.dtype).removeprefix("torch.")
        names = {parameter: layer for layer, parameter in group.layers.items()}
        for first, last in group.steps():
            before = group.read(base, first, last)
            after = group.read(merged, first, last)
            for parameter in group.shapes:
                old = group.rows(before, parameter, first, last)
                new = group.rows(after, parameter, first, last)
                if parameter in changes:
                    error = _error(old, new, changes[parameter], first, device)
                    errors.append(Worst(error, names[parameter], stored))
                # Parameters that share a stored tensor with adapted ones must keep their bytes.
                elif not torch.equal(_bytes(old), _bytes(new)):
                    errors.append(Worst(float("inf"), parameter, stored))
    largest = max(errors, key=lambda worst: (math.isnan(worst.error), worst.error))
    coarsest = max(
        (worst.stored for worst in errors),
        key=lambda stored: torch.finfo(getattr(torch, stored)).eps,
    )
    return Worst(largest.error, largest.layer, coarsest)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _error(old: Tensor, new: Tensor, change: Change, first: int, device: torch.device) -> float:
    if old.ndim == 3:
        errors = [
            _error(old[i], new[i], change.expert(first + i), 0, device) for i in range(len(old))
        ]
        return float(np.max(errors))  # NaN, if one of them is
    worst = 0.0
    count = max(1, AT_ONCE // max(1, old.shape[1]))
    precision = torch.finfo(new.dtype)
    for begin in range(0, len(old), count):
        end = min(begin + count, len(old))
        merged = new[begin:end].to(device).double()
        exact = old[begin:end].to(device).double() + change.exact(begin, end, device)
        # The size of one rounding follows from the largest power of two that is not above the number.
        power = (exact.view(torch.int64) & _EXPONENT).view(torch.float64)
        unit = power.clamp_(min=precision.tiny).mul_(precision.eps / 2)
        slack = change.slack(begin, end, device).double() + 2 * UNIT * exact.abs()
        ratio = float((merged - exact).abs_().div_(unit.add_(slack)).max())
        if math.isnan(ratio):
            return ratio
        worst = max(worst, ratio)
    return worst


def changed(base: Path, merged: Path, share: Sequence[Group]) -> list[str]:
    """Return one line for each difference between a merged folder and its base that no adapter explains."""
    files = weight_files(base)
    theirs = sorted(file.name for file in merged.glob("*.safetensors"))
    if theirs != files:
        return [
            f"its weight files are {', '.join(theirs) or 'missing'}; the base model has {', '.join(files)}"
        ]
    lines = []
    for name in (INDEX, "config.json", model_files.GENERATION):
        before = None if is_stale_index(base, name) else _json(base / name)
        after = _json(merged / name)
        if _but_ends(name, model_files.portable_config(before)) != _but_ends(name, after):
            lines.append(f"{name} differs from the base model's")
    for name in files:
        if (base / name).stat().st_size != (merged / name).stat().st_size:
            lines.append(f"{name} differs in size from the base model's")
    if lines:
        return lines
    # Each file that differs outside of the adapted weights, with its first such byte.
    adapted: dict[str, list[tuple[int, int]]] = {name: [] for name in files}
    for group in share:
        for entry in group.stored:
            adapted[entry.file].append((entry.start, entry.end))
    for name, ranges in adapted.items():
        offset = _first_difference(base / name, merged / name, sorted(ranges))
        if offset is not None:
            within = "its header"
            for entry in tensors(base).values():
                if entry.file == name and entry.start <= offset < entry.end:
                    within = entry.name
            lines.append(f"{name}: byte {offset} ({within}) differs from the base model's")
    return lines


def _but_ends(name: str, tree: Any) -> Any:
    # An export may write the tokens that end an answer into generation_config.json, or create that file for them.
    if name != model_files.GENERATION:
        return tree
    return {field: value for field, value in (tree or {}).items() if field not in _OF_ENDS}


def _json(file: Path) -> object:
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _first_difference(before: Path, after: Path, left_out: Sequence[tuple[int, int]]) -> int | None:
    # Both files have the same size.
    size = before.stat().st_size
    offset = 0
    for start, end in [*left_out, (size, size)]:
        for first in range(offset, start, 2**22):
            count = min(2**22, start - first)
            old = np.fromfile(before, np.uint8, count, offset=first)
            new = np.fromfile(after, np.uint8, count, offset=first)
            differing = np.flatnonzero(old != new)
            if len(differing):
                return first + int(differing[0])
        offset = max(offset, end)
    return None
