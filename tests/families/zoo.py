"""The tiny models of the families in variants.py: random weights with which attention, state and experts matter.

With the usual initialisation (standard deviation 0.02) a tiny model gives almost the same output after any context.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olora_ray.common.logs import quiet_transformers
from tests.export_parts import save_tokenizer
from tests.families.variants import Variant

# Parts of the names of parameters whose values are times or rates, which a family draws in its own range.
_STATE = ("A_log", "dt_bias", "recurrent_param", "time_step")


def build(variant: Variant, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model to `folder`: config, weights in `dtype` and a tokenizer; always the same bytes."""
    from transformers import AutoConfig

    model = make(variant, dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if not variant.chat:
        (folder / "chat_template.jinja").unlink()
    kind = AutoConfig.for_model(variant.model_type, **variant.sizes).model_type  # GPT-SW3's is gpt2
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind


def make(
    variant: Variant,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    experts: str | None = None,
) -> Any:
    """The model, frozen, in evaluation mode; always the same weights.

    `attention` and `experts` are implementations of transformers', None for its own choice.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    quiet_transformers()
    shape = AutoConfig.for_model(variant.model_type, **variant.sizes)
    # Vision families are saved with all parts, as their checkpoints are published; the causal class loads some of them.
    sees = variant.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind.from_config(shape, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _draw(name, parameter)
    if attention is not None:
        model.set_attn_implementation(attention)
    if experts is not None and model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    return model.to(dtype).eval().requires_grad_(False)


def on_meta(variant: Variant) -> Any:
    with torch.device("meta"):
        return make(variant)


def _draw(name: str, parameter: Tensor) -> None:
    """Draw large matrices, and vectors off the values with which they have no effect."""
    if any(part in name for part in _STATE):
        return
    if parameter.dim() < 2:  # norms, biases, sinks
        parameter.add_(torch.randn_like(parameter) * 0.1)
    else:
        parameter.normal_(0.0, 0.3 if "conv1d" in name else 0.15)
