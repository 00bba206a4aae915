"""The merged folder: the base's files with W + s (dB A0 + (B0 + dB) dA) in the place of each adapted weight W.

Each change is computed in float32 and added with one rounding to the precision that W is stored in. The folder has the
base's layout: each file of weights is copied, and only the bytes of adapted weights are written over, so that every
other byte is the base's. Memory holds one weight at a time, or a few experts of a stack, whatever the size of a file
or of the model.

Several workers can each merge a share of the weights into the same files; a share that is done twice does no harm,
because what is read is the base.
"""

import heapq
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from olora_ray.adapter import portable
from olora_ray.adapter.change import Change
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.layout import stored_transposed
from olora_ray.adapter.new_folder import replacing
from olora_ray.adapter.stored import is_stale_index, weight_files
from olora_ray.adapter.weight_group import Group
from olora_ray.adapter.weight_names import groups
from olora_ray.common.errors import UserError
from olora_ray.common.fault_points import reached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Weights in other formats, and the base's model card, which describes another model.
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", "README.md")
_CPU = torch.device("cpu")


def write_merged(
    base: Path, adapter: Mapping[str, AdapterWeights], scale: float, out: Path, model: "PreTrainedModel"
) -> None:
    """Write the base folder with the adapter merged into its weights; replaces `out` when complete.

    `base` has config.json, safetensors (one file or shards with an index) and tokenizer files; all
    but weights in other formats and the model card is copied. `model` is the model without weights. Raises UserError
    when `base` has no safetensors, or when an adapted weight is not in them exactly once, is tied, has another shape
    or is not floating point.
    """
    found = groups(base, model, adapter)
    changes_of(found, adapter, scale)
    with replacing(out) as folder:
        copy_files(base, folder)
        merge(base, folder, found, adapter, scale)


def copy_files(base: Path, folder: Path) -> None:
    """Copy all that a merged folder has of its base: files of weights as they are, config and tokenizer portable."""
    for entry in base.iterdir():
        if entry.is_file() and not _is_left_out(base, entry.name):
            shutil.copyfile(entry, folder / entry.name)
        elif entry.is_dir() and entry.name == portable.TEMPLATES:
            shutil.copytree(entry, folder / entry.name, copy_function=shutil.copyfile)
    portable.make_portable(folder)
    for name in weight_files(base):
        shutil.copyfile(base / name, folder / name)


def _is_left_out(base: Path, name: str) -> bool:
    return name.endswith(_LEFT_OUT) or name.startswith(".") or is_stale_index(base, name)


@torch.inference_mode()
def merge(
    base: Path,
    folder: Path,
    share: Sequence[Group],
    adapter: Mapping[str, AdapterWeights],
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
                weight = group.rows(numbers, parameter, first, last).to(device, wide)
                merged = (weight + change.merged(first, last, device)).to(numbers.dtype).cpu()
                group.put(numbers, parameter, merged, first, last)
            group.write(folder, numbers, first, last)


def changes_of(
    share: Sequence[Group], adapter: Mapping[str, AdapterWeights], scale: float
) -> list[tuple[Group, dict[str, Change]]]:
    """Each group with the changes of its parameters; raises UserError for an adapter of another shape."""
    found = []
    for group in share:
        changes = {
            parameter: Change(adapter[layer], scale, stored_transposed(group.model, layer))
            for layer, parameter in group.layers.items()
        }
        for parameter, change in changes.items():
            if group.shapes[parameter] != change.shape:
                raise UserError(
                    f"cannot merge {parameter}: its shape is {group.shapes[parameter]}, the adapter's {change.shape}"
                )
        found.append((group, changes))
    return found


def shares(found: Sequence[Group], workers: int) -> list[list[Group]]:
    """The groups for each worker: the largest first, to the one with the least; deterministic."""
    load = [(0, worker) for worker in range(workers)]
    parts: list[list[Group]] = [[] for _ in range(workers)]
    for group in sorted(found, key=lambda group: (-group.size, group.key)):
        total, worker = heapq.heappop(load)
        parts[worker].append(group)
        heapq.heappush(load, (total + group.size, worker))
    return parts
