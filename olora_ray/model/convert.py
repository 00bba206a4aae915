"""Conversion of base models in other formats to a folder with safetensors, once; nothing else reads those formats."""

import logging
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from olora_ray.common import copies, digests, local_files, storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.common.quiet import quiet_gguf
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import Model
from olora_ray.model import gguf_header, misfits
from olora_ray.model.foreign import foreign
from olora_ray.model.identity import of_folder, of_weights

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TEXTS = (".json", ".jinja", ".model", ".txt", ".py")
"""Files of a tokenizer, a generation config or, where that is allowed, code."""


def gguf(file: Path, config: AnyConfig) -> Path:
    """The folder with the dequantised weights of a GGUF file; raises UserError if it is broken."""
    dtype = "float32" if config.model.dtype == "float32" else "bfloat16"
    announcement = f"model: dequantising {file.name} to {dtype}, once"
    write = partial(_dequantise, file, DTYPES[dtype])
    # The last words: conversions of before were without the scaling of positions, or biases, and are made again.
    return _converted(write, file.stem, f"{of_weights([file])}/{dtype}/positions/biases", config, announcement)


def pickled(folder: Path, config: AnyConfig) -> Path:
    """The folder with the converted weights of one that has no safetensors, where `model.allow_pickle` is set.

    Raises UserError if it is not, or if there are no such weights.
    """
    files = _pickles(folder, config.model)
    announcement = f"model: converting {files[0].name} to safetensors, once"
    trusted = config.model.trust_remote_code
    # With the files that are copied: a config or a template that was mended since is a part of the model too.
    # The last word: conversions of before were in the config's precision, also where the weights have a higher one.
    key = f"{of_weights(files)}/{of_folder(folder, trusted)}/precision"
    return _converted(partial(_unpickle, folder, trusted), folder.name, key, config, announcement)


def _converted(write: Callable[[Path], None], name: str, key: str, config: AnyConfig, announcement: str) -> Path:
    """The folder beside the storage that `write` has filled, once for each `key`."""
    root = config.run.storage if not storage.is_uri(config.run.storage) else copies.CACHE
    target = Path(root) / "models" / f"{name}-{digests.digest(key, length=16)}"
    if (target / "config.json").exists():
        return target
    logger.info(announcement)
    with local_files.staged(target) as unfinished:
        write(unfinished)
    if not (target / "config.json").exists():
        raise UserError(f"model.name: {target} is there, but has no config.json; delete that folder")
    return target


def _pickles(folder: Path, config: Model) -> list[Path]:
    """The pickled weights of a folder without safetensors, if the config allows them; else raises UserError."""
    found = list(dict.fromkeys(file for pattern in PICKLES for file in sorted(folder.glob(pattern))))
    names = [file.name for file in found] or _not_fetched(config)
    if not names:
        raise UserError(f"model.name: {folder} has no usable weights: no *.safetensors")
    if not config.allow_pickle:
        raise UserError(
            f"model.name: {config.name} has no usable weights: only {names[0]}, a pickle, which can run code when it is"
            " loaded; use a model with safetensors, or set model.allow_pickle: true to have its tensors converted"
        )
    weights = [file for file in found if file.match(PICKLES[0])]
    if not weights:
        raise UserError(f"model.name: {config.name}: {names[0]} cannot be converted, only {PICKLES[0]} can")
    return weights


def _not_fetched(config: Model) -> list[str]:
    """The pickles of a hub model: they are not downloaded."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(config.name, revision=config.revision)
    except Exception:  # no hub id, or no hub: only the wording of an error depends on it
        return []
    return [name for pattern in PICKLES for name in names if fnmatch(name, pattern)]


def _dequantise(file: Path, dtype: torch.dtype, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_gguf()
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its type does not know output_loading_info
    with (
        as_user_error(f"model.name: reading {file.name} needs the package gguf", ImportError),
        foreign(f"model.name: {file} is not a GGUF model that loads"),
    ):
        passed_by = gguf_header.check(file)
        model, report = from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"model.name: {file} does not load: it has no weights for {', '.join(missing[:3])}")
    _check_biases(file, model)
    # The weights are dequantised, but transformers still marks the model as quantised and would
    # refuse to save it.
    plain: Any = model
    for name, value in passed_by.items():
        setattr(plain.config, name, {**getattr(plain.config, name), **value} if isinstance(value, dict) else value)
    plain.config.__dict__.pop("quantization_config", None)
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(plain, mark):
            setattr(plain, mark, None if mark != "is_quantized" else False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _readable(out)


def _check_biases(file: Path, model: Any) -> None:
    """Raise UserError for a bias of a layer that transformers makes without: such a file has no word of it.

    Granite's code models are of the architecture llama, and have them.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    known: Any = get_gguf_hf_weights_map(model, TensorProcessor())
    for tensor in GGUFReader(file).tensors:
        layer, _, last = tensor.name.rpartition(".")
        if last == "bias" and tensor.name not in known and f"{layer}.weight" in known and tensor.data.any():
            raise UserError(
                f"model.name: {file} has {tensor.name}, which transformers does not read for {type(model).__name__}: it"
                " would be trained without; name the folder or hub id that the file was made from, with safetensors"
            )


def _unpickle(folder: Path, trust_remote_code: bool, out: Path) -> None:
    """Convert the pytorch_model*.bin of a model folder; its other files are copied.

    Only tensors are unpickled, as transformers does by default and `weights_only` asks for: raises UserError for
    a file that holds anything else, and runs nothing in it.
    """
    from transformers import AutoModelForCausalLM

    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its type does not know output_loading_info
    with foreign(f"model.name: {folder} does not load"):
        try:
            model, report = from_pretrained(
                folder,
                dtype=_precision(folder, trust_remote_code),
                use_safetensors=False,
                weights_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except pickle.UnpicklingError:
            raise UserError(
                f"model.name: the pickled weights in {folder} hold more than tensors, or are damaged: they are not"
                " loaded"
            ) from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"model.name: {folder} does not load: it has no weights for {', '.join(missing[:3])}")
    _check_left_out(folder, model, sorted(report["unexpected_keys"]))
    model.save_pretrained(out)
    for file in folder.iterdir():
        if file.suffix in TEXTS and not (out / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    _readable(out)


_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias")
"""Ends of names of what earlier versions of transformers stored, in float32, though it follows from the config."""


def _precision(folder: Path, trust_remote_code: bool) -> torch.dtype | str:
    """The widest of the config's and of the weights': what config.json says need not be what they are stored in.

    Raises UserError for numbers of 8 bits, or less, without what says how they are meant.
    """
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(shape, "quantization_config", None) is not None:
        return "auto"
    found = {declared} if isinstance(declared := getattr(shape, "dtype", None), torch.dtype) else set()
    for name, tensor in _tensors(folder, "meta"):
        if tensor.dtype in _FLOATS:
            if tensor.dim() and not name.endswith(_COMPUTED):
                found.add(tensor.dtype)
        elif name.endswith("weight"):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"model.name: {folder} {misfits.packed(name, kind)}")
    return reduce(torch.promote_types, found) if found else "auto"


def _check_left_out(folder: Path, model: Any, names: Sequence[str]) -> None:
    """Say which tensors have no place in the model; raises UserError for a bias that its config turns off."""
    biases = tuple(name for name in names if misfits.is_bias(model, name))
    for name, tensor in _tensors(folder, "cpu") if biases else ():
        if name.endswith(biases) and bool(tensor.any()):
            raise UserError(f"model.name: {folder} {misfits.bias(model, name)}")
    if names:
        logger.warning(misfits.left_out(model, names, str(folder)))


def _tensors(folder: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the pickles that are converted; from a file in torch's format of today none is read at once."""
    from transformers.modeling_utils import load_state_dict

    for file in sorted(folder.glob(PICKLES[0])):
        for name, tensor in load_state_dict(file, map_location=device).items():
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


def _readable(folder: Path) -> None:
    for file in folder.iterdir():
        local_files.open_up(file)
