"""A trained adapter as folders that other tools load: a plain-LoRA adapter, and merged weights.

Both start from the *original* base weights W (m x n) and the adapter of adapter/factors.py:

    adapter folder   lora_A = [A0; dA] (2r x n), lora_B = [dB, B0 + dB] (m x 2r), the scale s kept
    merged folder    W + s (dB A0 + (B0 + dB) dA), in float32, rounded once to W's precision

The adapter folder is the PEFT format (what peft's `LoraModel.save_pretrained` writes), which vLLM
and others read too; a method with B0 = 0 gives rank r. The merged folder has the base's layout:
each weight file is copied and only the bytes of adapted weights are written over, so every other
byte is the base's and memory holds one weight at a time, whatever the size of a file.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from olora_ray.adapter import sharing
from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.layer import is_transposed
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.fault_points import reached
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import Adapter
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights in other formats, and the base's model card, which describes another model.
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", "README.md")


def write_adapter(
    adapter: Mapping[str, AdapterWeights],
    config_adapter: Adapter,
    base_name: str,
    out: Path,
    *,
    transposed: frozenset[str] = frozenset(),
    revision: str | None = None,
    complete: Callable[[Path, int], None] | None = None,
) -> None:
    """Write a plain-LoRA folder for the untouched base; replaces `out` when complete.

    `adapter` maps full module names to float32 weights; `base_name` is what readers see as the base
    model, and `revision` which of its commits; `transposed` names the modules that keep their weight
    as n x m (GPT-2's Conv1D). `complete` adds further files: it gets the folder and the rank of the
    matrices. vLLM must be started with `max_lora_rank` of at least the folder's `r` (2r of the run
    for OLoRA).
    """
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for name, weights in adapter.items():
        lora_a, lora_b = weights.plain_lora()
        ranks.add(lora_a.shape[0])
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a.float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b.float().cpu().contiguous()
    assert len(ranks) == 1, f"one rank for all layers, not {sorted(ranks)}"
    rank = ranks.pop()
    fields = _peft_fields(config_adapter, rank, list(adapter), base_name, bool(transposed))
    with _replacing(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        fields["revision"] = revision
        (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if complete is not None:
            complete(folder, rank)


def _peft_fields(
    config: Adapter, rank: int, modules: list[str], base_name: str, fan_in_fan_out: bool
) -> dict[str, object]:
    # s = alpha / r (or alpha / sqrt(r)) must stay the same at the stacked rank.
    growth = rank / config.rank
    alpha = config.alpha * (math.sqrt(growth) if config.rank_stabilized else growth)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rank_stabilized,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": modules,
    }


def write_merged(
    base: Path,
    adapter: Mapping[str, AdapterWeights],
    scale: float,
    out: Path,
    *,
    transposed: frozenset[str] = frozenset(),
) -> None:
    """Write the base folder with the adapter merged into its weights; replaces `out` when complete.

    `base` has config.json, safetensors (one file or shards with an index) and tokenizer files; all
    but weights in other formats and the model card is copied. Raises UserError when `base` has no
    safetensors, or when an adapted weight is not in them exactly once, is tied, has another shape
    or is not floating point.
    """
    places = _stored(base)
    chosen = _choose(adapter, places, base)
    with _replacing(out) as folder:
        _copy_other_files(base, folder)
        for file in sorted({place.file for place in places.values()}):
            shutil.copyfile(base / file, folder / file)
        reached("export")
        for module, tensor in chosen.items():
            delta = adapter[module].delta(scale)
            _add(folder, places[tensor], tensor, delta.T if module in transposed else delta)


def stored_weights(base: Path, modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module name -> (file, tensor name) of its weight in a model folder; raises UserError as write_merged does."""
    places = _stored(base)
    return {module: (places[name].file, name) for module, name in _choose(modules, places, base).items()}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: file, dtype as safetensors spells it, and its first byte in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def _stored(base: Path) -> dict[str, _Place]:
    index = base / _INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [_SINGLE]
    if outside := [name for name in files if name != os.path.basename(name)]:
        raise UserError(f"{base}: {_INDEX} names {outside[0]!r}, which is not a file in that folder")
    if missing := [name for name in files if not (base / name).is_file()]:
        raise UserError(f"{base}: no {missing[0]}; merging needs the base model's weights as safetensors")
    return {name: place for file in files for name, place in _header(base / file)}


def _header(path: Path) -> Iterator[tuple[str, _Place]]:
    # The format: 8 bytes length of the header, the header (JSON), the tensors (huggingface/safetensors).
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start = 8 + length + entry["data_offsets"][0]
            yield name, _Place(path.name, entry["dtype"], tuple(entry["shape"]), start)


def _choose(modules: Iterable[str], places: Mapping[str, _Place], base: Path) -> dict[str, str]:
    tied = _tied_head(base)
    chosen: dict[str, str] = {}
    for module in modules:
        name = _find(module, places, base)
        if name in chosen.values() or module.rpartition(".")[2] in tied:
            raise UserError(
                f"cannot merge {module}: its weight is tied to another layer; leave it out of adapter.targets"
            )
        chosen[module] = name
    return chosen


def _find(module: str, places: Mapping[str, _Place], base: Path) -> str:
    # Checkpoints may leave out the prefix of the headless model (GPT-2: h.0... for transformer.h.0...)
    # or have one more.
    exact = f"{module}.weight"
    if exact in places:
        return exact
    parts = exact.split(".")
    shorter = [".".join(parts[i:]) for i in range(1, len(parts) - 1)]
    found = [name for name in shorter if name in places]
    found += [name for name in places if name.endswith("." + exact)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"cannot merge {module}: {base} has its weight twice, as {found[0]} and {found[1]}")
    raise UserError(
        f"cannot merge {module}: {base} has no weight {exact}; a weight that is tied or stored under another name"
        " cannot be merged: leave it out of adapter.targets"
    )


def _tied_head(base: Path) -> frozenset[str]:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return frozenset({"lm_head", "embed_out"}) if config.get("tie_word_embeddings") else frozenset()


def _add(folder: Path, place: _Place, name: str, delta: Tensor) -> None:
    if place.dtype not in _DTYPES:
        raise UserError(f"cannot merge {name}: it is stored as {place.dtype}, which is not a floating-point weight")
    if place.shape != tuple(delta.shape):
        raise UserError(f"cannot merge {name}: its shape is {place.shape}, the adapter's {tuple(delta.shape)}")
    path = folder / place.file
    with safe_open(path, framework="pt") as file:
        weight: Tensor = file.get_tensor(name)
    merged = (weight.to(torch.float32) + delta.to(torch.float32).cpu()).to(_DTYPES[place.dtype]).contiguous()
    with path.open("r+b") as raw:
        raw.seek(place.start)
        raw.write(merged.view(torch.uint8).numpy().data)


def _copy_other_files(base: Path, folder: Path) -> None:
    for entry in base.iterdir():
        if entry.is_file() and not entry.name.endswith(_LEFT_OUT) and not entry.name.startswith("."):
            shutil.copyfile(entry, folder / entry.name)
        elif entry.is_dir() and entry.name == sharing.TEMPLATES:
            shutil.copytree(entry, folder / entry.name, copy_function=shutil.copyfile)
    sharing.make_portable(folder)


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well."""
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            storage.open_up(file)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def transposed_layers(base: BaseModel, config: AnyConfig, names: Iterable[str]) -> frozenset[str]:
    """Those of the named layers that keep their weight as n x m (GPT-2's Conv1D)."""
    shape = skeleton(base, config.model)
    return frozenset(name for name in names if is_transposed(shape.get_submodule(name)))
