"""Whether a model can take several examples in one sequence, as far as its structure tells.

Attention is kept inside an example by positions that start anew. What else carries something from one token to the
next does not stop there: convolutions, state spaces, linear attention; nor does attention that is not told the
positions. What the structure does not tell, the self-test finds before the first step (train/self_test.py).
"""

import inspect
from typing import Any

from torch import nn

from olora_ray.model.head import backbone

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "sparse", "moe")
"""Kinds of layers, as configs of transformers list them, that carry nothing over but by attention."""


def why_apart(model: Any) -> str | None:
    """Why every example of this model needs a row of its own, in words that follow "the model"; None: it does not."""
    config = model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION))
    if getattr(model, "_is_stateful", False) or kinds:
        return f"keeps a state from token to token ({', '.join(kinds) or type(model).__name__})"
    if any(isinstance(module, nn.Conv1d) for module in _language(model).modules()):
        return "has convolutions over the tokens"
    if "position_ids" not in inspect.signature(backbone(model).forward).parameters or getattr(config, "alibi", False):
        return "takes no positions, so it cannot know where an example begins"
    return None


def _language(model: Any) -> nn.Module:
    """The part that works on text: a tower for sounds or images may have convolutions."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else model
