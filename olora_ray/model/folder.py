"""Checks of a model folder before anything of it is loaded: what does not hold here would hang or fail obscurely there.

A model folder was often made by others. What it says of itself, its sizes above all, is compared with its files.
"""

import contextlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, first_line, short_reason
from olora_ray.common.text import plural

CONFIG, INDEX, ADAPTER = "config.json", "model.safetensors.index.json", "adapter_config.json"
SINGLE = "model.safetensors"
_LARGEST_JSON = 200 * 2**20
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


def _header(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    # safetensors compares the header with the file.
    with foreign(f"model.name: {file} is no safetensors file, or it is cut off"), safe_open(file, "pt") as stored:
        return [(name, tuple(stored.get_slice(name).get_shape())) for name in stored.keys()]  # noqa: SIM118


# Identity of a model: digests of its weights and of the other files that decide what it computes.


PIECES, PIECE = 64, 4096
"""Pieces of a file of weights that a glance reads, and the bytes of each."""
KEPT_FROM = 2**30
"""Bytes from which the digest of a file of weights is kept: an unchanged retraining says so within seconds."""
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
"""Config, generation config, index, tokenizer, chat templates."""
_CODE = "*.py"
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_UNIMPORTANT = ("transformers_version", "_name_or_path", "name_or_path")
"""Fields that change when the same model is saved again, or from another place."""
_SEPARATOR = "+"


def of_folder(folder: Path, code: bool) -> str:
    """The identity of a model folder; `code` says whether Python code in it would be run, and so is a part of it."""
    return of_weights(weight_files(folder)) + _SEPARATOR + storage.digest(_others(folder, code))


def look(folder: Path, code: bool) -> str:
    """What a glance tells of a model folder: its small files, and of its weights names, sizes and pieces of each file.

    Another model has another one, and so has one of which files are missing; `code` as in `of_folder`.
    """
    weights = "".join(f"{file.name}:{_pieces(file)}\n" for file in weight_files(folder))
    return storage.digest(_others(folder, code), weights)


def of_weights(files: Sequence[Path]) -> str:
    """SHA-256 over names and contents."""
    return storage.digest("".join(f"{file.name}:{_digest_of_weights(file)}\n" for file in files))


def weights(identity: str) -> str:
    """The part of an identity that is the digest of the weights."""
    return identity.partition(_SEPARATOR)[0]


def _others(folder: Path, code: bool) -> str:
    """A line for each file beside the weights."""
    patterns = (*_PATTERNS, _CODE) if code else _PATTERNS
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return "".join(f"{file.relative_to(folder).as_posix()}:{_digest_of_text(file)}\n" for file in files)


def _pieces(file: Path) -> str:
    """Digest of a file's size and of pieces from its begin to its end: of a small file that is all of it."""
    size, read = file.stat().st_size, []
    with file.open("rb") as stream:
        for place in (*range(0, size, max(PIECE, size // PIECES)), max(0, size - PIECE)):
            stream.seek(place)
            read.append(stream.read(PIECE))
    return storage.digest(size, storage.digest_bytes(b"".join(read)))


def _digest_of_weights(file: Path) -> str:
    """Of a file's content; for a large file kept on this node, for as long as its size and time of change hold."""
    info = file.stat()
    key = storage.digest(file.resolve(), info.st_size, info.st_mtime_ns, length=32)
    place = storage.join(node_cache.CACHE, "digests", key)
    if info.st_size >= KEPT_FROM and (known := node_cache.read(place)):
        return known
    found = storage.digest_file(file)
    if info.st_size >= KEPT_FROM:
        node_cache.keep(place, found)  # a home that is read-only, or full, is no reason not to train
    return found


def _digest_of_text(file: Path) -> str:
    if file.name in _CONFIGS:
        try:
            tree = json.loads(file.read_bytes())
            fields = {name: value for name, value in tree.items() if name not in _UNIMPORTANT}
            return storage.digest_json(fields)
        except (ValueError, AttributeError, RecursionError):  # damaged: loading it says so
            pass
    return storage.digest_file(file)


# Errors of libraries that read what others made.


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Raise whatever a library says of a model's files as the UserError `what: why`.

    These files decide which of the library's lines meets what it did not expect: no list of exceptions is complete.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {why(error)}") from None
    except BaseException as error:
        # A panic of the Rust code of tokenizers or safetensors is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {why(error)}") from None


def whole_model(what: str, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The causal language model that transformers loads, and the names of tensors that it has no place for.

    Raises UserError that begins with `what` if it does not load, or has no weights for a part of it.
    """
    from_pretrained: Any = text_class(path).from_pretrained  # its type does not know output_loading_info
    with foreign(what):
        model, report = from_pretrained(path, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{what}: it has no weights for {', '.join(missing[:3])}")
    return model, sorted(report["unexpected_keys"])


def text_class(folder: Path) -> Any:
    """The class of transformers that makes a folder's model for text; that of a model that sees is for pictures too.

    Raises UserError for an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    shape = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}  # a GGUF file has none beside it
    kind = shape.get("model_type")
    if shape.get("is_encoder_decoder") is True:
        raise UserError(
            f"model.name: {folder} is an encoder-decoder ({kind}), which is not trained here; name a causal language"
            " model"
        )
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in shape
    sees = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees and not causal else AutoModelForCausalLM


def why(error: BaseException) -> str:
    """Why a model does not load, in one line; of code that is not trusted, what to do."""
    if "Unrecognized configuration class" in str(error):
        return "transformers has no causal language model of its type; name a model that writes text"
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which is not run; read that code, and if you trust it set"
            " model.trust_remote_code: true"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "its pickled weights hold more than tensors, or are damaged: they are not loaded"
    known = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"


# What a model's files may have and its config does not describe, in words.


def is_unknown_bias(model: Any, name: str) -> bool:
    """Whether a name, with or without the backbone's prefix, is of a bias that a layer could have, and has not."""
    owner, _, last = name.rpartition(".")
    if last != "bias":
        return False
    modules = dict(model.named_modules())
    module = modules.get(owner) or modules.get(f"{model.base_model_prefix}.{owner}")
    return module is not None and module._parameters.get("bias", module) is None


def unsupported_bias(model: Any, name: str) -> str:
    """What is wrong with a folder that has such a bias, other than zero; to follow "FOLDER "."""
    return (
        f"has {name}, but by its config.json {type(model).__name__} has no such bias: it would be trained without;"
        " correct config.json (attention_bias, mlp_bias), or name a model whose files fit it"
    )


def unsupported_packing(name: str, kind: str) -> str:
    """What is wrong with a folder whose tensor is of this kind of 8 bits or less; to follow "FOLDER "."""
    return (
        f"has {name} as {kind}, and no quantization_config in its config.json that says what these numbers mean; name a"
        " model in bfloat16, float16 or float32"
    )


def unused_tensors(model: Any, names: Sequence[str], files: str) -> str:
    """The warning of tensors of these files that the model has no place for."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"model.name: {type(model).__name__} has no place for {plural(len(names), 'tensor')} in the files of {files},"
        f" and is trained without: {', '.join(names[:3])}{more}"
    )
