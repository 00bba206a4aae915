"""Loading a base model from its folder: tokenizer, frozen weights, precision and attention."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from olora_ray.common.errors import UserError
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.config.section import is_auto
from olora_ray.model import attention, convert
from olora_ray.model.folder import (
    check_model,
    foreign,
    parameters,
    read_json,
    text_class,
    whole_model,
)
from olora_ray.model.source import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Buffers that are computed, not stored: frequencies of rotary embeddings, scales, positions.


def computed_buffers(model: "PreTrainedModel") -> None:
    """Compute the buffers that no file holds, on the CPU; weights and other buffers stay as they are."""
    loaded: list[Any] = [*model.parameters(), *stored_buffers(model).values()]
    for tensor in loaded:
        tensor._is_hf_initialized = True  # so transformers knows what was loaded
    for module in model.modules():
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    initialise: Any = model.initialize_weights
    initialise()


def stored_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return name -> buffer for the buffers that the files hold."""
    buffers = {}
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(name, recurse=False):
            if own.rpartition(".")[2] not in module._non_persistent_buffers_set:
                buffers[own] = buffer
    return buffers


def load_tokenizer(base: BaseModel, config: ModelConfig) -> "PreTrainedTokenizerBase":
    with foreign(f"model.name: the tokenizer of {base.name} does not load"):
        return tokenizer_in(Path(base.folder), config.trust_remote_code)


def tokenizer_in(folder: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a folder as its tokenizer.json has it; raise what transformers raises."""
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    # Where mistral-common is installed, transformers prefers Mistral's own format: another tokenizer than elsewhere.
    form = {}
    if hasattr(tokenization_auto, "_use_mistral_format"):
        form["mistral_format"] = False
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code, **form
    )
    return found


def end_tokens(base: BaseModel, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's end token and those of generation_config.json."""
    ends = set()
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    file = Path(base.folder) / "generation_config.json"
    if file.is_file():
        listed = read_json(file).get("eos_token_id")
        if listed is None:
            listed = []
        elif not isinstance(listed, list):
            listed = [listed]
        if not all(type(number) is int and number >= 0 for number in listed):
            raise UserError(
                f"model.name: {file}: eos_token_id must be a token id or a list of them"
            )
        ends.update(listed)
    return tuple(sorted(ends))


def skeleton(base: BaseModel, config: ModelConfig) -> "PreTrainedModel":
    """Return the model without weights (on the meta device): names and shapes only."""
    with foreign(f"model.name: {base.folder} does not load"):
        return _on_meta(base.folder, config)


def _on_meta(folder: str | Path, config: ModelConfig, **options: Any) -> "PreTrainedModel":
    from transformers import AutoConfig

    remote = config.trust_remote_code
    shape = AutoConfig.from_pretrained(Path(folder), trust_remote_code=remote)
    with torch.device("meta"):
        model: PreTrainedModel = text_class(Path(folder)).from_config(
            shape, trust_remote_code=remote, **options
        )
    return model


def load_model(folder: str | Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """Return the frozen base model in evaluation mode, with the precision and the first attention for `config`.

    It stays in evaluation mode during training, because its own dropout would make the loss depend on how a batch is
    split. Raise UserError for weights that do not fit the config, and as `attention.candidates`.
    """
    dtype, first_attention = _start(folder, config, device)
    model, _ = whole_model(
        f"model.name: {folder} does not load",
        Path(folder),
        dtype=dtype,
        attn_implementation=first_attention,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
    )
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def empty_model(folder: str | Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """Return what `load_model` returns, but with weights and stored buffers on the meta device.

    Other buffers have their values. Raise UserError as `load_model`, but not for weights.
    """
    dtype, first_attention = _start(folder, config, device)
    with foreign(f"model.name: {folder} does not load"):
        model = _on_meta(folder, config, dtype=dtype, attn_implementation=first_attention)
        computed_buffers(model)
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def _start(
    folder: str | Path, config: ModelConfig, device: torch.device
) -> tuple[torch.dtype, str]:
    attention.register()
    check_model(Path(folder))
    shape = skeleton(BaseModel(str(folder), str(folder), ""), config)
    # A config.json that describes a far larger model than its weights are would fill the memory.
    described = sum(parameter.numel() for parameter in shape.parameters())
    stored = parameters(folder)
    # Correct are twice as many if input and output share a matrix, and 8 times as many if 4 bits are packed.
    if described > 16 * stored:
        raise UserError(
            f"model.name: {folder} does not load: config.json describes {described:,} parameters, its weights have"
            f" {stored:,}"
        )
    dtype = pick_dtype(config, device)
    return dtype, attention.candidates(shape, config, dtype, device)[0]


def pick_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the precision of the base: as configured, otherwise bfloat16 if `device` multiplies it natively."""
    if not is_auto(config.dtype):
        return convert.DTYPES[config.dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


# The free memory for one more model.


_PROC = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def too_large(folder: str, dtype: torch.dtype, device: torch.device) -> str | None:
    need = parameters(folder) * dtype.itemsize
    if need > 0.4 * free(device):  # the rest is for the measurement
        where = f"the memory of one {device.type}"
    elif device.type != "cpu" and need > 0.8 * free(torch.device("cpu")):
        # The CPU only passes it on, so it may use more.
        where = f"the memory of the node, through which it is loaded to the {device.type}"
    else:
        return None
    kind = str(dtype).removeprefix("torch.")
    return f"in {kind} the model has {need / 2**30:.1f} GiB, too large for {where}"


def free(device: torch.device) -> int:
    """Return the free bytes of a device; for a CPU, those of the machine within the limit of a container."""
    if device.type == "cuda":
        # Memory that torch has freed but keeps counts as used, and is taken first.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if _PROC.is_file():
        sizes = dict(line.split(":", 1) for line in _PROC.read_text().splitlines())
        available = int(sizes["MemAvailable"].split()[0]) * 1024
    else:  # not Linux: half of the memory is a guess
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        # The file cache counts as used, but Linux gives it up when memory is needed.
        cached = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return max(available, 0)
