"""Checks of a model folder before anything of it is loaded: what does not hold here would hang or fail obscurely there.

A model folder was often made by others. What it says of itself, its sizes above all, is compared with its files.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olora_ray.common.errors import UserError, short_reason

CONFIG, INDEX, ADAPTER = "config.json", "model.safetensors.index.json", "adapter_config.json"
SINGLE = "model.safetensors"
_LARGEST_JSON = 200 * 2**20
_LARGEST_HEADER = 100 * 2**20
"""Of the safetensors format."""
_LARGEST_NUMBER = 2**31
_MOST_LAYERS = 2000
"""Deeper models than any, and still built within seconds."""
_COUNTS_LAYERS = re.compile(r"layers?$")
"""Names of numbers of layers (num_hidden_layers, n_layer); others only say of what layers have (Gemma 3n's
vocab_size_per_layer_input)."""


def check(folder: Path) -> None:
    """Raise UserError unless config, index and headers of a folder with safetensors can be what they say."""
    if (folder / ADAPTER).exists():
        raise UserError(
            f"model.name: {folder} holds an adapter ({ADAPTER}), which would be loaded into the model unasked; name the"
            " base model, or merge the adapter and remove its files"
        )
    _check_numbers(read_json(folder / CONFIG), str(folder / CONFIG))
    missing = sorted(set(indexed(folder)) - {file.name for file in folder.iterdir()})
    # One file goes before an index, as in transformers and the merge: that of earlier shards stays when it is saved.
    if missing and not (folder / SINGLE).is_file():
        raise UserError(f"model.name: {folder} has no {missing[0][:200]!r}, which {INDEX} names")
    for _ in tensors(folder):
        pass


def indexed(folder: Path) -> list[str]:
    """The files of weights that the index names, none if there is no index; raises UserError if one lies elsewhere."""
    if not (folder / INDEX).exists():
        return []
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and name for name in places.values()):
        raise UserError(f"model.name: {folder / INDEX}: weight_map does not name a file for each tensor")
    names = sorted(set(places.values()))
    if outside := [name for name in names if name != os.path.basename(name) or name in (".", "..") or "\0" in name]:
        raise UserError(f"model.name: {folder / INDEX} names {outside[0][:200]!r}, which is not a file in that folder")
    return names


def tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, from the headers; raises UserError for a header that does not fit its file."""
    for file in weight_files(folder):
        yield from _header(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, by name."""
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def loaded_files(folder: Path) -> list[Path]:
    """Those of them that transformers loads: others may hold the same weights again (consolidated.safetensors)."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    return [folder / name for name in indexed(folder) if (folder / name).is_file()] or weight_files(folder)


def parameters(folder: str | Path) -> int:
    """Number of parameters in a model folder, read from the headers of the files that are loaded.

    Raises UserError as `tensors` and `indexed`.
    """
    return sum(math.prod(shape) for file in loaded_files(Path(folder)) for _, shape in _header(file))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; raises UserError for anything else."""
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise UserError(f"model.name: {file} is larger than {_LARGEST_JSON >> 20} MB: not a file of a model")
        tree = json.loads(file.read_bytes())
    except RecursionError:
        raise UserError(f"model.name: {file}: nested too deeply") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.name: {file}: {short_reason(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"model.name: {file}: expected a JSON object, found {type(tree).__name__}")
    return tree


def _check_numbers(tree: dict[str, Any], where: str) -> None:
    """Sizes are numbers within reason: others would make loading take for ever, or all memory."""
    waiting: list[tuple[str, Any]] = list(tree.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((str(key), item) for key, item in value.items())
        elif isinstance(value, list):
            waiting.extend((name, item) for item in value if isinstance(item, dict | list | int))
        elif isinstance(value, int) and abs(value) > (_MOST_LAYERS if _COUNTS_LAYERS.search(name) else _LARGEST_NUMBER):
            raise UserError(f"model.name: {where}: {name} cannot be {value:.0e}")


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    # The format: 8 bytes length of the header, the header (JSON), the tensors (huggingface/safetensors).
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise UserError(f"model.name: {file} is no safetensors file, or it is cut off")
        try:
            header = json.loads(stream.read(length))
            entries = [(name, *_entry(entry)) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"model.name: {file}: its header is no safetensors header") from None
    for name, shape, end in entries:
        if end > size - 8 - length:
            raise UserError(f"model.name: {file} is cut off: {name} ends at byte {8 + length + end}")
        yield name, shape


def _entry(entry: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Shape of a tensor, and where its data end."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError("no shape")
    # The smallest element has 4 bits.
    if math.prod(shape) > 2 * (end - begin):
        raise ValueError("more elements than bytes")
    return shape, end
