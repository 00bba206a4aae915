"""ModelConfig -> a folder of safetensors, then a frozen base model and its tokenizer.

`obtain` runs once, in the driver: whatever the name means (hub id, folder, package, GGUF file, registered
model), afterwards there is a folder with config.json, safetensors and tokenizer files, and a digest of
the weights. Workers and the export read that folder.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.quiet import quiet_transformers
from olora_ray.config import paths
from olora_ray.config.schema import Config, Data
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model import convert

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        source = convert.gguf(source, config, say)
    elif not (source / "config.json").is_file():
        raise UserError(f"model.name: {source} has no config.json, so it is not a model folder")
    elif not list(source.glob("*.safetensors")):
        source = convert.pickled(source, config, say)
    return BaseModel(name, str(source), convert.digest(sorted(source.glob("*.safetensors"))))


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
        raise UserError(f"model.name: {base.name} has no tokenizer that loads: {_why(error)}") from None
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
        raise UserError(f"model.name: {base.folder} does not load: {_why(error)}") from None


def load_model(folder: str | Path, config: ModelConfig, device: torch.device) -> "PreTrainedModel":
    """The frozen base model in the precision and with the attention of `config`, in evaluation mode.

    It stays in evaluation mode during training: the base's own dropout would make the loss depend on
    how a batch is split. Raises UserError for weights that do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    from olora_ray.model import segment_attention as attention

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
        raise UserError(f"model.name: {folder} does not load: {_why(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"model.name: {folder} does not load: it has no weights for {', '.join(missing[:3])}")
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def pick_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the base: as configured, else bfloat16 where `device` multiplies it natively."""
    if config.dtype != "auto":
        return convert.DTYPES[config.dtype]
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
        return paths.package_file(name)
    if storage.is_uri(name):
        # Each address has a folder of its own: s3://a/model is not s3://b/model.
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        return storage.local_copy(name, f"{storage.CACHE}/models/{key}")
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
    if config.allow_pickle:
        patterns += ["pytorch_model*.bin"]
    try:
        return Path(snapshot_download(config.name, revision=config.revision, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.name: {config.name}: not a folder here, and the model hub did not deliver it: {_first_line(error)}"
        ) from None


def _why(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which is not run; read that code, and if you trust it set"
            " model.trust_remote_code: true"
        )
    return _first_line(error)


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
