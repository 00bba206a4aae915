"""The frozen base as a training computes with it: as its files have it, or with packed linear layers.

Packed are the linear layers of the language model's blocks, adapted or not, and neither routers nor gates, whose few
numbers decide much. Embeddings, norms and the output head stay, and so do experts whose weights are one parameter. The
layers are packed one after the other as they are read, so that the whole base is never in memory as it was.
"""

import logging
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from olora_ray.adapter.candidates import GATE, ROUTER, candidates
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model.load import empty_model, load_model
from olora_ray.model.quantised import KINDS, QuantisedLinear, require
from olora_ray.train import base_files
from olora_ray.train.base_files import BaseFiles
from olora_ray.train.blocks import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_frozen(folder: str | Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """What `load_model` returns, with `model.quantization`; packed layers are on `device` already.

    Raises UserError as `load_model` and `to_pack`.
    """
    if config.quantization == "none":
        return load_model(folder, config, device)
    began = time.perf_counter()
    require(config.quantization)
    model: Any = empty_model(folder, config, device)
    names = to_pack(model)
    found = base_files.find(Path(folder), model)
    problem = found if isinstance(found, str) else found.differs(0, 1)
    if problem is None:
        assert isinstance(found, BaseFiles)
        for name in names:
            _pack(model, name, found.whole(f"{name}.weight"), config.quantization, device)
        base_files.fill(model, found, lambda _: True)
    else:
        logger.info(f"quantization: the whole base is loaded before it is packed: {problem}")
        model = load_model(folder, config, device)
        names = to_pack(model)  # of one that is quantised already there is none
        for name in names:
            _pack(model, name, model.get_submodule(name).weight, config.quantization, device)
    taken = time.perf_counter() - began
    logger.info(f"quantization: {len(names)} linear layers are kept as {config.quantization}, packed in {taken:.2f} s")
    frozen: PreTrainedModel = model
    return frozen


def to_pack(model: nn.Module) -> list[str]:
    """The layers that are packed, in the model's order; raises UserError if there is none."""
    inside = {id(part) for block in decoder_layers(model) for part in block.modules()}
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    found = []
    for name, item in candidates(model).items():
        module: Any = item.target.module
        plain = type(module) is nn.Linear and item.refused is None and item.aside not in (ROUTER, GATE)
        even = plain and module.weight.numel() % 2 == 0  # two numbers share a byte
        if even and id(module) in inside and shared[id(module.weight)] == 1:
            found.append(name)
    if not found:
        raise UserError(
            f"model.quantization: {type(model).__name__} has no layers of torch's class Linear in its blocks, which"
            " alone are packed; set it to none"
        )
    return found


def packed_size(model: nn.Module, kind: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """(numbers that are packed, their bytes, bytes that the largest layer takes while it is unpacked)."""
    shapes = [tuple(model.get_parameter(f"{name}.weight").shape) for name in to_pack(model)]
    use = KINDS[kind]
    return (
        sum(m * n for m, n in shapes),
        sum(use.size(m, n) for m, n in shapes),
        max(m * n for m, n in shapes) * use.unpacking(dtype.itemsize),
    )


def _pack(model: nn.Module, name: str, weight: Tensor, kind: str, device: torch.device) -> None:
    """Put a packed layer in the place of one; its bias may still be without numbers."""
    parent, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(name)
    setattr(model.get_submodule(parent), attribute, QuantisedLinear(weight, module.bias, kind, device))
