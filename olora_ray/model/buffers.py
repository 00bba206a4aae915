"""Buffers that are computed, not stored: frequencies of rotary embeddings, scales, positions.

On the meta device they have no values. transformers gives them these at loading, after the weights, by each module's
own initialisation (PreTrainedModel.initialize_weights), which passes by what is marked as there already.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARK = "_is_hf_initialized"
"""The attribute by which transformers knows tensors that were loaded."""


def computed_buffers(model: "PreTrainedModel") -> None:
    """Give the buffers that no file holds their values, on the CPU; weights and other buffers stay as they are."""
    computed = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                computed.append((module, name, buffer))
            else:
                setattr(buffer, _MARK, True)
        for parameter in module.parameters(recurse=False):
            setattr(parameter, _MARK, True)
    for module, name, buffer in computed:
        module._buffers[name] = torch.empty_like(buffer, device="cpu")
    initialise: Any = model.initialize_weights
    initialise()


def stored_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer, of those that the files hold."""
    found = {}
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(name, recurse=False):
            if own.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[own] = buffer
    return found
