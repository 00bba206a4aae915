"""Conversion of base models in other formats to safetensors, once; no other module reads those formats."""

import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.config.schema import AnyConfig
from olora_ray.model.folder import (
    foreign,
    of_weights,
    whole_model,
)

logger = logging.getLogger(__name__)

# Fields of a GGUF file that transformers ignores.


_LARGEST_NUMBER = 2**31
_BLOCK = re.compile(r"blk\.(\d+)\.")
# Tensors that divide the frequencies of rotary positions.
_DIVISORS = "rope_freqs.weight"
_OTHER_DIVISORS = ("rope_factors_long.weight", "rope_factors_short.weight")
# The architecture whose scaled positions transformers reads.
_READS_SCALING = "gpt-oss"
# Architectures whose base of the frequencies transformers ignores: it then takes 10,000, but StarCoder 2 has up to a
# million.
_PASSES_BASE_BY = ("starcoder2", "stablelm")
# Architectures whose window of attention transformers ignores: Phi-3's models of 4k see 2,047 tokens. Phi-4's files say
# 0, for none.
_PASSES_WINDOW_BY = ("phi3",)
# Architectures whose attention transformers divides by the root of this number, because no GGUF file has the divisor.
# It is the size of a head, except in the 27B models: 144 and 168, with heads of 128.
_GUESSES_SCALE = ("gemma2", "gemma3")
_SCALE = 256
# Of Llama 3.1 to 3.3, whose files have the divisors that follow from these numbers and a factor.
_LOW = 1.0
_HIGH = 4.0
_ORIGINAL = 8192
_INSTEAD = "name the folder or hub id with its original safetensors"


def check_gguf(file: Path) -> dict[str, Any]:
    """Raise UserError unless a file has everything that its header counts, and its sizes are those of its tensors.

    Return the rotary positions and the window that transformers ignores, as fields of its config, for the caller to
    set. Raise UserError also if these cannot be determined.
    """
    with foreign(f"model.name: {file} cannot be loaded as a GGUF model"):
        reader = _reader(file)
        values = {}
        for name, field in reader.fields.items():
            if len(field.types) == 1:  # no lists
                values[name] = field.contents()
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        _check_sizes(values, tensors)
        architecture = values["general.architecture"]
        scale = values.get(f"{architecture}.attention.key_length", _SCALE)
        if architecture in _GUESSES_SCALE and scale != _SCALE:
            raise ValueError(
                f"a GGUF file does not contain this model's attention scale; {_INSTEAD}"
            )
        rope = {}
        theta = values.get(f"{architecture}.rope.freq_base")
        if architecture in _PASSES_BASE_BY and isinstance(theta, int | float):
            rope["rope_theta"] = theta
        rope |= _scaling(values, tensors)
        fields: dict[str, Any] = {}
        if rope:
            fields["rope_parameters"] = rope
        window = values.get(f"{architecture}.attention.sliding_window")
        if architecture in _PASSES_WINDOW_BY and type(window) is int and window > 0:
            fields["sliding_window"] = window
        return fields


def _reader(file: Path) -> Any:
    # gguf's own reader accepts values beyond the end of a file, up to 2^64 of them; this one raises.
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **named: Any) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(
                    f"it is cut off: its header counts more than its {len(self.data):,} bytes"
                )
            return super()._get(offset, dtype, count, *more, **named)

    return Bounded(file)


def _check_sizes(values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    # transformers builds a model of these sizes before it reads the tensors, so a wrong size could fill the memory.
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it has no general.architecture")
    for key, value in values.items():
        if (
            key.startswith(f"{architecture}.")
            and isinstance(value, int)
            and abs(value) > _LARGEST_NUMBER
        ):
            raise ValueError(f"{key[:60]} cannot be {value}")
    blocks = {match[1] for match in map(_BLOCK.match, tensors) if match}
    largest = max((int(tensor.shape.max()) for tensor in tensors.values()), default=0)
    for name, most, unit in (
        ("block_count", len(blocks), "blocks"),
        ("embedding_length", largest, "numbers per row at most"),
        ("feed_forward_length", largest, "numbers per row at most"),
    ):
        value = values.get(f"{architecture}.{name}", 0)
        if not isinstance(value, int) or value > most:
            raise ValueError(
                f"{architecture}.{name} is {str(value)[:40]}, but its tensors have {most} {unit}"
            )


def _scaling(values: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    architecture = values["general.architecture"]
    rope = f"{architecture}.rope"
    kind = values.get(f"{rope}.scaling.type", "linear")  # as llama.cpp takes it
    factor = values.get(f"{rope}.scaling.factor", values.get(f"{rope}.scale_linear", 1))
    unsupported = next((name for name in _OTHER_DIVISORS if name in tensors), None)
    if architecture != _READS_SCALING and kind != "none" and factor not in (0, 1):
        unsupported = str(kind)[:40]
    divisors = np.ones(1, np.float32)
    if _DIVISORS in tensors:
        divisors = tensors[_DIVISORS].data
    theta = values.get(f"{rope}.freq_base", 10_000.0)
    largest = float(divisors.max())
    scaled = not bool((divisors == 1).all())
    if (
        scaled
        and unsupported is None
        and not (architecture == "llama" and _are_of_llama3(divisors, theta, largest))
    ):
        unsupported = _DIVISORS
    if unsupported is not None:
        raise ValueError(
            f"scaled rotary positions ({unsupported}) are not read from a GGUF file; {_INSTEAD}"
        )
    if not scaled:
        return {}
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _are_of_llama3(divisors: Any, theta: Any, factor: float) -> bool:
    if divisors.ndim > 1 or divisors.dtype != np.float32:
        return False
    if not isinstance(theta, int | float) or not (1 < theta < 1e12 and 1 < factor < 1e6):
        return False
    share = np.arange(len(divisors)) / len(divisors)
    turns = _ORIGINAL / (2 * math.pi * theta**share)  # of the angle in the original length
    smooth = ((turns - _LOW) / (_HIGH - _LOW)).clip(0.0, 1.0)
    return bool(np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3, atol=0))


# The conversions.


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gguf(file: Path, config: AnyConfig) -> Path:
    dtype = "float32" if config.model.dtype == "float32" else "bfloat16"
    key = storage.digest(f"{of_weights([file])}/{dtype}", length=16)
    cache = Path(node_cache.CACHE) / "models"
    remote = storage.is_uri(config.run.storage)
    models = cache if remote else Path(config.run.storage) / "models"
    target = models / f"{file.stem}-{key}"
    if (target / "config.json").exists():
        return target

    def convert(unfinished: Path) -> None:
        logger.info(f"model: dequantising {file.name} to {dtype}, once on this machine")
        _dequantise(file, DTYPES[dtype], unfinished)

    if remote:
        node_cache.cached(target, convert)
        return target
    # A storage gets links to the machine's files, or copies: other nodes and the users of exported adapters read them
    # there, and the cache removes its own when it needs room.
    with storage.staged(target) as unfinished:
        try:
            entry = node_cache.cached(
                cache / f"{target.name}-{storage.digest(node_cache.code(), length=8)}", convert
            )
        except OSError:  # the home folder cannot be written
            convert(unfinished)
        else:
            shutil.copytree(entry, unfinished, copy_function=_link)
            node_cache.make_room(cache)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copyfile(source, target)
        storage.open_up(Path(target))


def _dequantise(file: Path, dtype: torch.dtype, out: Path) -> None:
    from tqdm import tqdm
    from transformers import AutoTokenizer, modeling_gguf_pytorch_utils

    # transformers' progress bar is for a terminal, not for a log. None: enabled only on a terminal.
    vars(modeling_gguf_pytorch_utils)["tqdm"] = partial(tqdm, disable=None)
    what = f"model.name: {file} cannot be loaded as a GGUF model"
    with (
        as_user_error(f"model.name: reading {file.name} needs the package gguf", ImportError),
        foreign(what),
    ):
        passed_by = check_gguf(file)
        model, _ = whole_model(what, file.parent, gguf_file=file.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _check_biases(file, model)
    # The weights are dequantised, but transformers still marks the model as quantised and would
    # refuse to save it.
    plain: Any = model
    for name, value in passed_by.items():
        if isinstance(value, dict):
            value = {**getattr(plain.config, name), **value}
        setattr(plain.config, name, value)
    plain.config.__dict__.pop("quantization_config", None)
    marks = {"hf_quantizer": None, "quantization_method": None, "is_quantized": False}
    for mark, unset in marks.items():
        if hasattr(plain, mark):
            setattr(plain, mark, unset)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for written in out.iterdir():
        storage.open_up(written)


def _check_biases(file: Path, model: Any) -> None:
    """Raise UserError for a bias that transformers ignores, because a GGUF file does not say that layers have one.

    Granite's code models are of the architecture llama, and have such biases.
    """
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    known: Any = get_gguf_hf_weights_map(model, TensorProcessor())
    for tensor in _reader(file).tensors:
        layer, _, last = tensor.name.rpartition(".")
        if (
            last == "bias"
            and tensor.name not in known
            and f"{layer}.weight" in known
            and tensor.data.any()
        ):
            raise UserError(
                f"model.name: {file} has {tensor.name}, which transformers ignores for {type(model).__name__};"
                f" {_INSTEAD}"
            )
