"""Reading of a plain-LoRA folder that was exported here (peft_folder.write_adapter), to merge it into its base."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from olora_ray.adapter.factors import AdapterWeights, Factors
from olora_ray.common.errors import UserError
from olora_ray.model.folder import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_MORE = ("target_parameters", "modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication")
"""Settings of PEFT with which an adapter is more than one product of two matrices a layer."""


def read(folder: Path) -> tuple[dict[str, AdapterWeights], float]:
    """Module name -> its adapter in float32, and the scale of all.

    B0 is zero, so the change of a layer is scale * lora_B lora_A. Raises UserError for an adapter of another form, such
    as one of experts: PEFT itself loads these, but here they are not merged.
    """
    fields = read_json(folder / CONFIG)
    if fields.get("peft_type") != "LORA" or fields.get("bias", "none") != "none" or any(map(fields.get, _MORE)):
        raise UserError(
            f"model.name: {folder} is not a plain LoRA of linear layers, so it cannot be merged here;"
            " evaluate it as it is, or register it with export.merged: true to train on top of it"
        )
    tensors = load_file(folder / WEIGHTS)
    names = [name.removeprefix(_PREFIX).removesuffix(_A) for name in tensors if name.endswith(_A)]
    if set(tensors) != {f"{_PREFIX}{name}{end}" for name in names for end in (_A, _B)}:
        raise UserError(
            f"model.name: {folder / WEIGHTS} does not have a lora_A and a lora_B of each layer, and no more"
        )
    rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    return {name: _weights(tensors[f"{_PREFIX}{name}{_A}"], tensors[f"{_PREFIX}{name}{_B}"]) for name in names}, scale


def _weights(lora_a: torch.Tensor, lora_b: torch.Tensor) -> AdapterWeights:
    return AdapterWeights(Factors(lora_a.float(), None), torch.zeros_like(lora_a, dtype=torch.float32), lora_b.float())
