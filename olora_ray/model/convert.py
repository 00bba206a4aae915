"""Conversion of base models in other formats to a folder with safetensors, once; nothing else reads those formats."""

import logging
import math
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial, reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.common.logs import quiet_gguf
from olora_ray.config.schema import AnyConfig, Model
from olora_ray.model import folder as misfits
from olora_ray.model.folder import foreign, of_folder, of_weights

logger = logging.getLogger(__name__)

# Check of a GGUF file's header against the file: who takes its numbers as they are hangs, or fills the memory.


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 2**20
_LARGEST_NUMBER = 2**31
_LONGEST_NAME = 2**16
_BLOCK = re.compile(r"blk\.(\d+)\.")
_DIVISORS, _OTHER_DIVISORS = "rope_freqs.weight", ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors by which the frequencies of rotary positions are divided."""
_MOST_DIVISORS = 2**16
_READS_SCALING = "gpt-oss"
"""The architecture whose scaled positions transformers reads."""
_PASSES_BASE_BY = ("starcoder2", "stablelm")
"""Those whose base of the frequencies it passes by: it is 10,000 then, where StarCoder 2 has up to a million."""
_PASSES_WINDOW_BY = ("phi3",)
"""Those whose window of attention it passes by: Phi-3's models of 4k see 2,047 tokens. Phi-4's says 0, for none."""
_GUESSES_SCALE, _SCALE = ("gemma2", "gemma3"), 256
"""Those whose attention transformers divides by the root of this, since no such file says by what. It is the size of
a head, but in the models of 27B: 144 and 168, with heads of 128."""
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
"""Of Llama 3.1 to 3.3, whose files have the divisors that follow from them, and a factor."""
_ALIKE = 1e-3
_INSTEAD = "name the folder or hub id that it was made from, with safetensors"


class _Broken(Exception):
    pass


def check(file: Path) -> dict[str, Any]:
    """Raise UserError unless all that the header counts is there, and its sizes are those of its tensors.

    Returns what transformers passes by of the model's rotary positions and window, as fields of its config, for the
    caller to set. Raises UserError also where they cannot be told.
    """
    try:
        with file.open("rb") as stream:
            return _check(_Reader(stream, os.fstat(stream.fileno()).st_size))
    except (_Broken, UnicodeDecodeError) as error:
        raise UserError(f"model.name: {file} is not a GGUF model that loads: {error}") from None


def _check(reader: "_Reader") -> dict[str, Any]:
    if reader.take(4) != b"GGUF":
        raise _Broken("it does not begin as one")
    if (version := reader.number("I")) not in _VERSIONS:
        raise _Broken(f"version {version} is not known")
    tensors, pairs = reader.count("tensors", 24), reader.count("values", 12)
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text(_LONGEST_NAME)
        values[key] = reader.value(reader.number("I"))
    shapes = dict(_tensor_infos(reader, tensors))
    _check_sizes(values, shapes)
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise _Broken(f"general.alignment cannot be {str(alignment)[:40]}")
    data = -(-reader.place // alignment) * alignment
    for name, (_, offset, size) in shapes.items():
        if data + offset + size > reader.size:
            raise _Broken(f"it is cut off: {name[:60]!r} ends at byte {data + offset + size:,} of {reader.size:,}")
    architecture = values["general.architecture"]
    if architecture in _GUESSES_SCALE and values.get(f"{architecture}.attention.key_length", _SCALE) != _SCALE:
        raise _Broken(f"by what its attention is divided is not in such a file; {_INSTEAD}")
    found: dict[str, Any] = {}
    theta = values.get(f"{architecture}.rope.freq_base")
    rope = {"rope_theta": theta} if isinstance(theta, int | float) and architecture in _PASSES_BASE_BY else {}
    if rope := rope | (_scaling(reader, values, shapes, data) or {}):
        found["rope_parameters"] = rope
    window = values.get(f"{architecture}.attention.sliding_window")
    if architecture in _PASSES_WINDOW_BY and type(window) is int and window > 0:
        found["sliding_window"] = window
    return found


def _tensor_infos(reader: "_Reader", count: int) -> Iterator[tuple[str, tuple[list[int], int, int]]]:
    """Name -> (dimensions, offset, bytes) of each tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for _ in range(count):
        name, dimensions = reader.text(_LONGEST_NAME), reader.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Broken(f"{name[:60]!r} has {dimensions} dimensions")
        shape = [reader.number("Q") for _ in range(dimensions)]
        kind, offset = reader.number("I"), reader.number("Q")
        try:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _Broken(f"{name[:60]!r} has numbers of type {kind}, which is not known") from None
        if not all(shape) or math.prod(shape) % block:
            raise _Broken(f"{name[:60]!r} cannot have the dimensions {shape}")
        yield name, (shape, offset, math.prod(shape) // block * width)


def _check_sizes(values: dict[str, Any], tensors: dict[str, tuple[list[int], int, int]]) -> None:
    """A model of this size is built before its tensors are read."""
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise _Broken("it does not say its general.architecture")
    for key, value in values.items():
        if key.startswith(f"{architecture}.") and isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
            raise _Broken(f"{key[:60]} cannot be {value}")
    blocks = {int(found[1]) for name in tensors if (found := _BLOCK.match(name)) and len(found[1]) < 9}
    largest = max((max(shape) for shape, _, _ in tensors.values()), default=0)
    for name, most, what in (
        ("block_count", len(blocks), "blocks"),
        ("embedding_length", largest, "numbers in a row at most"),
        ("feed_forward_length", largest, "numbers in a row at most"),
    ):
        value = values.get(f"{architecture}.{name}", 0)
        if not isinstance(value, int) or value > most:
            raise _Broken(f"{architecture}.{name} is {str(value)[:40]}, but its tensors have {most} {what}")


def _scaling(
    reader: "_Reader", values: dict[str, Any], tensors: dict[str, tuple[list[int], int, int]], data: int
) -> dict[str, Any] | None:
    """As `check`; the data of the tensors begin at byte `data`."""
    architecture = values["general.architecture"]
    rope = f"{architecture}.rope"
    kind = values.get(f"{rope}.scaling.type", "linear")  # as llama.cpp takes it
    factor = values.get(f"{rope}.scaling.factor", values.get(f"{rope}.scale_linear", 1))
    if architecture != _READS_SCALING and kind != "none" and factor not in (0, 1):
        raise _other_positions(str(kind)[:40])
    if other := next((name for name in _OTHER_DIVISORS if name in tensors), None):
        raise _other_positions(other)
    if _DIVISORS not in tensors:
        return None
    shape, offset, size = tensors[_DIVISORS]
    if len(shape) > 1 or shape[0] > _MOST_DIVISORS or size != 4 * shape[0]:
        raise _other_positions(_DIVISORS)
    divisors = reader.floats(data + offset, shape[0])
    if all(each == 1 for each in divisors):
        return None
    theta, largest = values.get(f"{rope}.freq_base", 10_000.0), max(divisors)
    if architecture != "llama" or not _are_of_llama3(divisors, theta, largest):
        raise _other_positions(_DIVISORS)
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _are_of_llama3(divisors: Sequence[float], theta: Any, factor: float) -> bool:
    """Whether these are the divisors of Llama 3.1 (transformers.modeling_rope_utils) for this theta and factor."""
    if not isinstance(theta, int | float) or not (1 < theta < 1e12 and 1 < factor < 1e6):
        return False
    for place, found in enumerate(divisors):
        turns = _ORIGINAL / (2 * math.pi * theta ** (place / len(divisors)))  # of the angle in the original length
        smooth = min(max((turns - _LOW) / (_HIGH - _LOW), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not abs(found - expected) <= _ALIKE * expected:
            return False
    return True


def _other_positions(what: str) -> _Broken:
    return _Broken(f"it scales its rotary positions ({what}), which is not read from such a file; {_INSTEAD}")


class _Reader:
    """The bytes of a file from its start, none beyond its end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self.size, self.place = stream, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.place:
            raise _Broken(f"it is cut off at byte {self.size:,}")
        self.place += count
        return self._stream.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, what: str, smallest: int) -> int:
        """How many of something follow, each of at least `smallest` bytes."""
        found = int(self.number("Q"))
        if found * smallest > self.size - self.place:
            raise _Broken(f"it counts {found:,} {what}, more than fit into its {self.size:,} bytes")
        return found

    def text(self, most: int | None = None) -> str:
        length = self.count("letters of a text", 1)
        if most is not None and length > most:
            raise _Broken(f"it has a name of {length:,} letters")
        return self.take(length).decode("utf-8", "strict" if most else "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value; None for a list, of which only the sizes are read."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            self._list(depth)
            return None
        if kind not in _SCALARS:
            raise _Broken(f"it has a value of type {kind}, which is not known")
        return self.number(_SCALARS[kind])

    def _list(self, depth: int) -> None:
        kind = int(self.number("I"))
        if kind in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            self._skip(self.count("numbers", width) * width)
        elif kind == _STRING:
            for _ in range(self.count("texts", 8)):
                self._skip(self.count("letters of a text", 1))
        elif kind == _ARRAY and depth < _MOST_DIMENSIONS:
            for _ in range(self.count("lists", 12)):
                self._list(depth + 1)
        else:
            raise _Broken(f"it has a list of values of type {kind}")

    def floats(self, place: int, count: int) -> tuple[float, ...]:
        """Numbers of 4 bytes each, at a place within the file; nothing more of the header is read then."""
        self._stream.seek(place)
        return struct.unpack(f"<{count}f", self._stream.read(4 * count))

    def _skip(self, count: int) -> None:
        self._stream.seek(count, os.SEEK_CUR)
        self.place += count


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
    return _converted(write, file.stem, f"{of_weights([file])}/{dtype}", config, announcement)


def pickled(folder: Path, config: AnyConfig) -> Path:
    """The folder with the converted weights of one that has no safetensors, where `model.allow_pickle` is set.

    Raises UserError if it is not, or if there are no such weights.
    """
    files = _pickles(folder, config.model)
    announcement = f"model: converting {files[0].name} to safetensors, once"
    trusted = config.model.trust_remote_code
    # With the files that are copied: a config or a template that was mended since is a part of the model too.
    key = f"{of_weights(files)}/{of_folder(folder, trusted)}"
    return _converted(partial(_unpickle, folder, trusted), folder.name, key, config, announcement)


def _converted(write: Callable[[Path], None], name: str, key: str, config: AnyConfig, announcement: str) -> Path:
    """The folder beside the storage that `write` has filled, once for each `key`."""
    root = config.run.storage if not storage.is_uri(config.run.storage) else node_cache.CACHE
    target = Path(root) / "models" / f"{name}-{storage.digest(key, length=16)}"
    if (target / "config.json").exists():
        return target
    logger.info(announcement)
    with storage.staged(target) as unfinished:
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
        passed_by = check(file)
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
        storage.open_up(file)
