"""Choice of a model's attention: what its family has, what the precision and the device can, the fastest first.

Whether an implementation computes what the model's own does is not believed here: the self-test looks
(train/self_test.py).
"""

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from olora_ray.common.errors import UserError, first_line
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model import varlen_attention

FLASH, VARLEN = "flash_attention_2", varlen_attention.NAME
_SUPPORT = {
    "segments": "_supports_attention_backend",
    VARLEN: "_supports_attention_backend",
    FLASH: "_supports_flash_attn",
    "sdpa": "_supports_sdpa",
}
"""What a class of transformers calls the property of taking an implementation; every one has eager."""


def candidates(model: nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Implementations to be tried, in this order; the one of the config alone if it names one.

    Raises UserError if the config names one that the family, the precision or the device does not have.
    """
    if config.attention != "auto":
        if problem := _unusable(model, config.attention, dtype, device):
            raise UserError(f"model.attention={config.attention}: {problem}; set it to auto")
        return (config.attention,)
    wanted = ("segments", "sdpa", "eager") if device.type == "cpu" else (FLASH, VARLEN, "sdpa", "eager")
    return tuple(name for name in wanted if not _unusable(model, name, dtype, device))


def own(model: Any) -> str:
    """The implementation that takes masks and is the family's own: sdpa, or eager where it has none (Gemma 2)."""
    return "sdpa" if model._supports_sdpa else "eager"


def _unusable(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why an implementation cannot be used, or None."""
    if not getattr(model, _SUPPORT.get(name, ""), True):
        return f"{type(model).__name__} does not have it"
    # transformers would take one of these in its place: a kernel that it fetches from the hub, or fails to.
    if name == FLASH and FLASH not in (getattr(model, "_compatible_flash_implementations", None) or (FLASH,)):
        return f"{type(model).__name__} is made for other kernels"
    if name not in (FLASH, VARLEN):
        return None
    if device.type != "cuda":
        return "it needs a GPU"
    if missing := _missing(name):
        return missing
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not compute in {str(dtype).removeprefix('torch.')}; set model.dtype to bfloat16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of the Ampere generation or later"
    return varlen_attention.trial(dtype, device) if name == VARLEN else None


def _missing(name: str) -> str | None:
    """The code that an implementation needs and that is not here, or None."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    if name == VARLEN:
        return None if varlen_attention.kernel() else f"torch has it since 2.12, this is {torch.__version__}"
    return _import_problem() if is_flash_attn_2_available() else "the package flash-attn is not installed"


@lru_cache(maxsize=1)  # an import that fails is tried anew each time
def _import_problem() -> str | None:
    """Why the package flash-attn does not import, or None: it is built for one torch, and installed beside any."""
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
    except Exception as error:  # ImportError of a library, or whatever its code does there
        return f"the package flash-attn does not import: {first_line(error)}"
    return None
