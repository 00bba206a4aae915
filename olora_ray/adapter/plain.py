"""Reading of an adapter folder that was exported here (peft_folder.write_adapter), to merge it into its base."""

from pathlib import Path

from safetensors import safe_open
from torch import nn

from olora_ray.adapter.factors import AdapterWeights
from olora_ray.adapter.peft_folder import CONFIG as CONFIG
from olora_ray.adapter.peft_folder import WEIGHTS as WEIGHTS
from olora_ray.adapter.peft_folder import read_adapter
from olora_ray.common.errors import UserError
from olora_ray.model.folder import read_json

_MORE = ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication")
"""Settings of PEFT with which an adapter is more than one product of two matrices a layer."""


def read(folder: Path, model: nn.Module) -> tuple[dict[str, AdapterWeights], float]:
    """Name of a layer -> its adapter in float32, and the scale of all; `model` is the base, weights or not.

    Raises UserError for an adapter of another form, or of another model: PEFT itself may load these, but here they
    are not merged.
    """
    fields = read_json(folder / CONFIG)
    if fields.get("peft_type") != "LORA" or fields.get("bias", "none") != "none" or any(map(fields.get, _MORE)):
        raise UserError(
            f"model.name: {folder} is not a plain LoRA, so it cannot be merged here; evaluate it as it is, or register"
            " it with export.merged: true to train on top of it"
        )
    try:
        adapter, scale = read_adapter(folder, model)
    except (KeyError, AttributeError, ValueError, RuntimeError, TypeError):
        adapter, scale = {}, 0.0
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = len(list(file.keys()))
    if not adapter or stored != 2 * len(adapter):
        raise UserError(
            f"model.name: {folder / WEIGHTS} does not have a lora_A and a lora_B of each layer, and no more"
        )
    return adapter, scale
