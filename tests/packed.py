"""What tests of quantised bases share: which kinds can be tried here, and the same model with unpacked weights."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from olora_ray.model.quantised import KINDS, QuantisedLinear

THERE = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not THERE, reason="bitsandbytes is not installed")
EACH_KIND = [
    pytest.param(name, marks=[needs_bitsandbytes] if kind.library else [], id=name)
    for name, kind in KINDS.items()
]


def dense(layer: QuantisedLinear) -> nn.Linear:
    """A layer of torch with the weight that a packed one unpacks to."""
    with torch.device("meta"):
        found = nn.Linear(layer.in_features, layer.out_features, bias=False)
    found.weight = nn.Parameter(layer.weight, requires_grad=False)
    found.bias = layer.bias
    return found


def unpack(model: Any) -> Any:
    """The model, with each packed layer replaced by `dense` of it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense(module))
    return model
