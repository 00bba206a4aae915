"""ModelConfig -> a folder of safetensors, then a frozen base model and its tokenizer.

`obtain` runs once, in the driver: whatever the name means (hub id, folder, package, GGUF file, registered
model), afterwards there is a folder with config.json, safetensors and tokenizer files, and a digest of
the weights. Workers and the export read that folder.
"""

import hashlib
import json
import os
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from olora_ray import locate, storage
from olora_ray.config import Config, Data
from olora_ray.config import Model as ModelConfig
from olora_ray.errors import UserError
from olora_ray.quiet import quiet_gguf, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE = os.path.expanduser("~/.cache/olora_ray")
"""Where a node keeps models that do not lie on a shared storage."""
KEPT_FROM = 2**30
"""Bytes from which the digest of a file of weights is kept: an unchanged retraining says so within seconds."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk."""

    name: str
    """As the config names it."""
    folder: str
    """Local folder with config.json, safetensors and tokenizer files; see `on_this_node`."""
    digest: str
    """SHA-256 over the weights."""


def obtain(config: Config, say: Callable[[str], None], registered: Callable[[str], Path]) -> BaseModel:
    """Find, download or convert the base model of a run; `registered` finds models:/ names.

    Raises UserError for a name that leads nowhere, a folder without safetensors, or a broken GGUF file.
    """
    quiet_transformers()
    name = config.model.name
    source = registered(name) if name.startswith("models:/") else _source_folder(config)
    if source.suffix == ".gguf":
        source = _from_gguf(source, config, say)
    weights = sorted(source.glob("*.safetensors"))
    if not (source / "config.json").is_file():
        raise UserError(f"model.name: {source} has no config.json, so it is not a model folder")
    if not weights:
        pickles = [found.name for pattern in PICKLES for found in source.glob(pattern)]
        why = (
            f"only {pickles[0]}, a pickle, which is not loaded; convert it to safetensors"
            if pickles
            else "no *.safetensors"
        )
        raise UserError(f"model.name: {source} has no usable weights: {why}")
    return BaseModel(name, str(source), _digest(weights))


def on_this_node(base: BaseModel, config: Config) -> BaseModel:
    """The base model where this process can read it: the driver's folder if this node sees it, else fetched anew.

    Raises UserError if it cannot be fetched here, or is not the same here.
    """
    if Path(base.folder).is_dir():
        return base
    if base.name.startswith("models:/") or Path(base.name).is_absolute():
        raise UserError(
            f"model.name: {base.folder} is not on every node; put it, or run.storage, where all nodes see it"
        )
    found = obtain(config, lambda _: None, Path)
    if found.digest != base.digest:
        raise UserError(
            f"model.name: {base.name} has other weights on this node than on the driver's; set model.revision"
        )
    return found


def load_tokenizer(base: BaseModel, config: ModelConfig) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; raises UserError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            Path(base.folder), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name: {base.name} has no tokenizer that loads: {_first_line(error)}") from None
    return tokenizer


def end_tokens(base: BaseModel, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end token and those of generation_config.json."""
    found = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    file = Path(base.folder) / "generation_config.json"
    if file.is_file():
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(ids) if isinstance(ids, list) else {ids} - {None}
    return tuple(sorted(found))


def skeleton(base: BaseModel, config: ModelConfig) -> "PreTrainedModel":
    """The model without weights (on the meta device): names and shapes only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    remote = config.trust_remote_code
    try:
        shape = AutoConfig.from_pretrained(Path(base.folder), trust_remote_code=remote)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, trust_remote_code=remote)
        return model
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name: {base.folder} does not load: {_first_line(error)}") from None


def load_model(folder: str | Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """The frozen base model in the precision and with the attention of `config`, in evaluation mode.

    It stays in evaluation mode during training: the base's own dropout would make the loss depend on
    how a batch is split. Raises UserError for weights that do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    from olora_ray import attention

    attention.register()
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its type does not know output_loading_info
    try:
        model, report = from_pretrained(
            Path(folder),
            dtype=pick_dtype(config, device),
            attn_implementation=pick_attention(config, device),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"model.name: {folder} does not load: {_first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"model.name: {folder} does not load: it has no weights for {', '.join(missing[:3])}")
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def pick_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the base: as configured, else bfloat16 where `device` multiplies it natively."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return (
        torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    )


def pick_attention(config: ModelConfig, device: torch.device) -> str:
    """The attention implementation: as configured, else the fastest that is there."""
    if config.attention != "auto":
        return config.attention
    if device.type == "cpu":
        return "segments"
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def check_attention(shape: Any, attention: str, data: Data) -> None:
    """Raise UserError where this attention would not do for packed examples what the family does for single ones."""
    window = getattr(shape, "sliding_window", None)
    windowed = window is not None and window < data.max_length
    if attention == "segments" and getattr(shape, "attn_logit_softcapping", None) is not None:
        raise UserError("model.attention: this model caps its attention scores; set it to eager")
    if windowed and attention == "segments":
        raise UserError(
            f"model.attention: this model attends within {window} tokens, fewer than data.max_length={data.max_length};"
            f" lower data.max_length, or set model.attention: sdpa and data.packing: false"
        )
    if windowed and data.packing and attention in ("sdpa", "eager"):
        raise UserError(
            f"data.packing: this model attends within {window} tokens, fewer than data.max_length={data.max_length};"
            f" lower data.max_length, or set data.packing: false"
        )


def _source_folder(config: Config) -> Path:
    name = config.model.name
    if name.startswith("package://"):
        return locate.package_file(name)
    if storage.is_uri(name):
        return storage.local_copy(name, CACHE)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"model.name: {name}: no such file or folder, and not a hub id (ORG/NAME)")
    return _from_hub(config.model)


def _from_hub(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    if config.trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(config.name, revision=config.revision, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.name: {config.name}: not a folder here, and the model hub did not deliver it: {_first_line(error)}"
        ) from None


def _from_gguf(file: Path, config: Config, say: Callable[[str], None]) -> Path:
    """Dequantise a GGUF file once into an ordinary model folder beside the storage."""
    dtype = "float32" if config.model.dtype == "float32" else "bfloat16"
    key = hashlib.sha256(f"{_digest([file])}/{dtype}".encode()).hexdigest()[:16]
    root = config.run.storage if not storage.is_uri(config.run.storage) else CACHE
    target = Path(root) / "models" / f"{file.stem}-{key}"
    if (target / "config.json").exists():
        return target
    say(f"model: dequantising {file.name} to {dtype}, once")
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    _dequantise(file, DTYPES[dtype], partial)
    try:
        os.replace(partial, target)
    except OSError:  # another run was faster
        if not (target / "config.json").exists():
            raise
    return target


def _dequantise(file: Path, dtype: torch.dtype, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_gguf()
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise UserError(f"model.name: reading {file.name} needs the package gguf: {_first_line(error)}") from None
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        raise UserError(f"model.name: {file} is not a GGUF model that loads: {_first_line(error)}") from None
    # The weights are dequantised, but transformers still marks the model as quantised and would
    # refuse to save it.
    plain: Any = model
    plain.config.__dict__.pop("quantization_config", None)
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(plain, mark):
            setattr(plain, mark, None if mark != "is_quantized" else False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for saved in out.iterdir():
        saved.chmod(0o644)  # safetensors writes 0600; other users' jobs read this too


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}:{_sha256(file)}\n".encode())
    return total.hexdigest()


def _sha256(file: Path) -> str:
    """Of a file's content; for a large file kept on this node, for as long as its size and time of change hold."""
    info = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {info.st_size} {info.st_mtime_ns}".encode()).hexdigest()[:32]
    kept = storage.join(CACHE, "digests", key)
    if info.st_size >= KEPT_FROM and storage.exists(kept):
        return storage.read_text(kept)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if info.st_size >= KEPT_FROM:
        storage.write_text(kept, found)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parameters(folder: str) -> int:
    """Number of parameters in a model folder, read from the safetensors' headers."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for extent in tensor["shape"]:
                    size *= extent
                total += size
    return total
