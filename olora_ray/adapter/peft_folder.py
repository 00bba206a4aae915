"""The adapter folder: a plain LoRA for the untouched base, in the format of PEFT, which vLLM and others read too.

    lora_A = [A0; dA] (2r x n), lora_B = [dB, B0 + dB] (m x 2r), the scale s kept

A method with B0 = 0 gives rank r. Layers of a smaller rank than the largest are padded with zeros to it, so that the
folder has one rank and one scale, which every reader knows. A stack of E experts is one of PEFT's `target_parameters`:
its lora_A (2rE x n) has the experts one after the other; its lora_B (m x 2rE) has, for each of the 2r directions, the
experts side by side (peft.tuners.lora.layer.ParamWrapper.get_delta_weight).

In some families PEFT reads names as transformers 4 used them for experts: it takes "gate_proj" of any layer for a part
of the experts, and would adapt these instead (peft.utils.transformers_weight_conversion). So a linear layer of such a
name is written as its parameter, whose name PEFT does not change.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from olora_ray.adapter.candidates import is_stack, stored_transposed
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.common import storage
from olora_ray.common.errors import UserError

# A folder that exists only when it is complete.


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`, which replaces `out` if the block ends without an error."""
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with storage.staged(out) as partial:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            storage.open_up(file)
        if out.exists():
            shutil.rmtree(out)


WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
Adapters = Mapping[str, AdapterWeights]
"""Full name of a layer -> its adapter."""


class Size(Protocol):
    """Settings that a folder takes from the config's section `adapter`."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...

    @property
    def rank_stabilized(self) -> bool: ...


@dataclass(frozen=True)
class Names:
    """The names by which PEFT learns which layers are adapted."""

    modules: list[str]
    parameters: list[str]
    """Stacks, and the weights of linear layers whose names PEFT would misread."""
    keys: dict[str, str]
    """Layer -> the name of its matrices in the file, without `.lora_A.weight`."""


def write_adapter(
    adapter: Adapters,
    config_adapter: Size,
    base_name: str,
    out: Path,
    model: nn.Module,
) -> None:
    """Write a plain-LoRA folder for the untouched base; replaces `out` when complete. Arguments: see `new_adapter`."""
    with new_adapter(adapter, config_adapter, base_name, out, model):
        pass


@contextmanager
def new_adapter(
    adapter: Adapters,
    config_adapter: Size,
    base_name: str,
    out: Path,
    model: nn.Module,
    revision: str | None = None,
) -> Iterator[tuple[Path, int]]:
    """Yield a plain-LoRA folder for the untouched base, which replaces `out` if the block ends without an error.

    Yields the folder, which PEFT can read and to which the block may add files, and the rank of its matrices. `adapter`
    maps full names of layers to float32 weights. `model` is the base; its weights are not read, so a skeleton will do.
    `base_name` is the base model's name for readers, and `revision` its commit. vLLM must be started with
    `max_lora_rank` of at least the folder's `r` (2r of the run for OLoRA).
    """
    names = names_of(model, adapter)
    tensors: dict[str, Tensor] = {}
    rank = max(weights.plain_rank() for weights in adapter.values())
    for layer, weights in adapter.items():
        lora_a, lora_b = weights.plain_lora()
        spare = rank - weights.plain_rank()  # rows and columns of zeros add nothing
        lora_a = F.pad(lora_a, (0, 0, 0, spare))
        lora_b = F.pad(lora_b, (0, spare))
        if lora_a.ndim == 3:
            if _other_way_round(model, layer):
                lora_a, lora_b = lora_b.mT, lora_a.mT
            lora_a = lora_a.flatten(0, 1)
            lora_b = lora_b.permute(1, 2, 0).flatten(1)
        key = _PREFIX + names.keys[layer]
        tensors[f"{key}.lora_A.weight"] = lora_a.float().cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = lora_b.float().cpu().contiguous()
    fields = _peft_fields(config_adapter, rank, names, base_name, model)
    fields["revision"] = revision
    with replacing(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        yield folder, rank


def _read(
    fields: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, AdapterWeights]:
    parameters = fields.get("target_parameters") or []
    # A stack has its parameter's name, which may also end in "weight" (JetMoE); a linear layer has its module's.
    layers = [
        name if model.get_parameter(name).ndim == 3 else name.removesuffix(".weight")
        for name in parameters
    ]
    layers += fields["target_modules"]
    keys = names_of(model, layers).keys
    found = {}
    for layer in layers:
        lora_a, lora_b = (tensors[f"{_PREFIX}{keys[layer]}.lora_{part}.weight"] for part in "AB")
        if is_stack(model, layer):
            experts = len(model.get_parameter(layer))
            lora_a = lora_a.unflatten(0, (experts, -1))
            lora_b = lora_b.unflatten(1, (-1, experts)).permute(2, 0, 1)
            if _other_way_round(model, layer):
                lora_a, lora_b = lora_b.mT, lora_a.mT
        found[layer] = AdapterWeights(Factors(torch.zeros_like(lora_a), None), lora_a, lora_b)
    return found


def _other_way_round(model: nn.Module, layer: str) -> bool:
    # PEFT believes what the module declares in transformers' interface for experts. If that is wrong, it takes the
    # stack's E x n x m parameter for E x m x n, and what it calls A is B^T.
    declared = bool(getattr(model.get_submodule(layer.rpartition(".")[0]), "is_transposed", False))
    return stored_transposed(model, layer) != declared


def _peft_fields(
    config: Size, rank: int, names: Names, base_name: str, model: nn.Module
) -> dict[str, object]:
    # alpha grows with the stacked rank, so that s = alpha / r (or alpha / sqrt(r)) stays the same.
    growth = rank / config.rank
    if config.rank_stabilized:
        growth = math.sqrt(growth)
    alpha = config.alpha * growth
    task_type = None
    if hasattr(model, "prepare_inputs_for_generation"):
        task_type = "CAUSAL_LM"
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rank_stabilized,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(stored_transposed(model, layer) for layer in names.modules),
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": names.modules,
    }
    if names.parameters:
        fields["target_parameters"] = names.parameters
    return fields


def names_of(model: nn.Module, layers: Iterable[str]) -> Names:
    layers = list(layers)
    mistaken = _mistaken(model)
    modules = []
    parameters = []
    keys = {}
    for layer in layers:
        if is_stack(model, layer):
            parameters.append(layer)
            # PEFT wraps a module once for each of its parameters, in their order: the last wrapper is the outermost.
            module, _, own = layer.rpartition(".")
            beside = [
                name for name, _ in model.get_submodule(module).named_parameters(recurse=False)
            ]
            adapted = [name for name in beside if f"{module}.{name}" in layers]
            keys[layer] = module + ".base_layer" * (len(adapted) - 1 - adapted.index(own))
        else:
            keys[layer] = layer
            if layer.rpartition(".")[2] in mistaken:
                parameters.append(f"{layer}.weight")
            else:
                modules.append(layer)
    return Names(modules, parameters, keys)


def _mistaken(model: Any) -> frozenset[str]:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is None:
        return frozenset()
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # PEFT's versions for transformers 4 have no such table
        return frozenset()
    tables: Any = conversion
    pattern = tables._MODEL_TO_CONVERSION_PATTERN.get(family)
    return frozenset(tables._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


# Compression of an adapter to a smaller rank, for servers with a limit: the best approximation in the Frobenius norm.


def compress(adapter: Adapters, rank: int) -> tuple[dict[str, AdapterWeights], float]:
    """Return the adapter with at most `rank` directions per layer, and the share of its change that is lost.

    The share is the Frobenius norm of the lost part divided by the norm of the change, over all layers together. An
    adapter whose matrices have at most `rank` directions is returned unchanged. Stacks keep `rank` directions per
    expert.
    """
    if all(weights.plain_rank() <= rank for weights in adapter.values()):
        return dict(adapter), 0.0
    compressed = {}
    lost = whole = 0.0
    for name, weights in adapter.items():
        lora_a, lora_b = weights.plain_lora()
        q_up, r_up = torch.linalg.qr(lora_b.double())
        q_down, r_down = torch.linalg.qr(lora_a.double().mT)
        left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
        root = values[..., :rank].sqrt()
        up = q_up @ (left[..., :rank] * root.unsqueeze(-2))
        down = (root.unsqueeze(-1) * right[..., :rank, :]) @ q_down.mT
        # A small matrix may have fewer than `rank` directions. Zeros give all layers the same rank.
        spare = rank - root.shape[-1]
        da = F.pad(down, (0, 0, 0, spare)).float().contiguous()
        db = F.pad(up, (0, spare)).float().contiguous()
        # With B0 = 0 the whole change is dB dA, so that export, merge and checks treat it like any other adapter.
        compressed[name] = AdapterWeights(Factors(torch.zeros_like(da), None), da, db)
        squares = values.square()
        lost += float(squares[..., rank:].sum())
        whole += float(squares.sum())
    if not whole:
        return compressed, 0.0
    return compressed, (lost / whole) ** 0.5


# Reading an adapter folder that this project exported, to merge it into its base.


_MORE = ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication")
"""PEFT's settings that make an adapter more than one product of two matrices per layer."""


def read_adapter(folder: Path, model: nn.Module) -> tuple[dict[str, AdapterWeights], float]:
    """Return layer -> its adapter in float32, and the scale of all; `model` is the base, with weights or without.

    The whole change is in dA and dB, with B0 = 0. Raises UserError for an adapter of another form or of another model:
    PEFT may load these, but they cannot be merged here.
    """
    from olora_ray.model.folder import read_json  # with pydantic, which a writer does not need

    fields = read_json(folder / CONFIG)
    if (
        fields.get("peft_type") != "LORA"
        or fields.get("bias", "none") != "none"
        or any(map(fields.get, _MORE))
    ):
        raise UserError(
            f"model.name: {folder} is not a plain LoRA, so it cannot be merged here; evaluate it unmerged, or register"
            " it with export.merged: true to train on top of it"
        )
    tensors = load_file(folder / WEIGHTS)
    adapter = {}
    with suppress(KeyError, AttributeError, ValueError, RuntimeError, TypeError):
        rank = fields["r"]
        scale = fields["lora_alpha"] / (math.sqrt(rank) if fields["use_rslora"] else rank)
        adapter = _read(fields, tensors, model)
    if not adapter or len(tensors) != 2 * len(adapter):
        raise UserError(
            f"model.name: {folder / WEIGHTS} must have a lora_A and a lora_B for each layer of {CONFIG}, and no more"
        )
    return adapter, scale
