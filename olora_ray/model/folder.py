"""Checks of a model folder before it is loaded: with such faults, loading would hang or fail with an obscure error.

A model folder was often made by others. The sizes that its config names are compared with its files.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import UserError, as_user_error, first_line, short_reason

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
SINGLE = "model.safetensors"
_LARGEST_JSON = 200 * 2**20
_LARGEST_NUMBER = 2**31
# More than any model has, but few enough to be built within seconds.
_MOST_LAYERS = 2000
# Names of numbers of layers (num_hidden_layers, n_layer); other names count what layers have (Gemma 3n's
# vocab_size_per_layer_input).
_COUNTS_LAYERS = re.compile(r"layers?$")


def check_model(folder: Path) -> None:
    """Raise UserError unless config, index and headers of a folder with safetensors can be true."""
    if (folder / ADAPTER).exists():
        raise UserError(
            f"model.name: {folder} also has an adapter ({ADAPTER}), which transformers would load too; name the"
            " base model, or merge the adapter and remove its files"
        )
    _check_numbers(read_json(folder / CONFIG), str(folder / CONFIG))
    missing = sorted(set(indexed(folder)) - {file.name for file in folder.iterdir()})
    # A single file takes precedence over an index, as in transformers and the merge: saving it leaves an old index.
    if missing and not (folder / SINGLE).is_file():
        raise UserError(f"model.name: {folder} has no {missing[0][:200]!r}, which {INDEX} names")
    for file in weight_files(folder):
        _header(file)


def indexed(folder: Path) -> list[str]:
    """Return the weight files that the index names, none without an index; raise UserError if one lies elsewhere."""
    if not (folder / INDEX).exists():
        return []
    file_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(
        isinstance(name, str) and name for name in file_of.values()
    ):
        raise UserError(
            f"model.name: {folder / INDEX}: weight_map does not name a file for each tensor"
        )
    names = sorted(set(file_of.values()))
    for name in names:
        if name != os.path.basename(name) or name in (".", "..") or "\0" in name:
            raise UserError(
                f"model.name: {folder / INDEX} names {name[:200]!r}, which is not a file in that folder"
            )
    return names


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def loaded_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads: others may hold the same weights in another form.

    An example is consolidated.safetensors.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    listed = [folder / name for name in indexed(folder) if (folder / name).is_file()]
    return listed or weight_files(folder)


def parameters(folder: str | Path) -> int:
    """Return the number of parameters in a model folder, from the headers of the files that are loaded.

    Raise UserError if a header does not fit its file, and as `indexed`.
    """
    return sum(sum(map(math.prod, _header(file))) for file in loaded_files(Path(folder)))


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; raise UserError for anything else."""
    with as_user_error(
        f"model.name: {file}", OSError, ValueError, RecursionError, reason=short_reason
    ):
        if file.stat().st_size > _LARGEST_JSON:
            raise UserError(
                f"model.name: {file} is larger than {_LARGEST_JSON >> 20} MB, too large for a model's file"
            )
        tree = json.loads(file.read_bytes())
    if not isinstance(tree, dict):
        raise UserError(f"model.name: {file}: expected a JSON object, found {type(tree).__name__}")
    return tree


def _check_numbers(tree: dict[str, Any], where: str) -> None:
    # An absurd size would make loading take for ever, or fill the memory.
    waiting: list[tuple[str, Any]] = list(tree.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((str(key), item) for key, item in value.items())
        elif isinstance(value, list):
            waiting.extend((name, item) for item in value if isinstance(item, dict | list | int))
        elif isinstance(value, int):
            most = _MOST_LAYERS if _COUNTS_LAYERS.search(name) else _LARGEST_NUMBER
            if abs(value) > most:
                raise UserError(f"model.name: {where}: {name} cannot be {value:.0e}")


def _header(file: Path) -> list[list[int]]:
    # The shapes of the tensors; safetensors compares the header with the file.
    with (
        foreign(f"model.name: {file} is not a safetensors file, or is cut off"),
        safe_open(file, "pt") as stored,
    ):
        return [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118


# Identity of a model: digests of its weights and of the other files that decide what it computes.


# Pieces of a weight file that a glance reads, and the bytes of each.
PIECES = 64
PIECE = 4096
# Bytes from which the digest of a weight file is kept, so that a retraining without a change says so within seconds.
KEPT_FROM = 2**30
# Config, generation config, index, tokenizer, chat templates.
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")

_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
# Fields that change when the same model is saved again, or at another path.
_UNIMPORTANT = ("transformers_version", "_name_or_path", "name_or_path")
_SEPARATOR = "+"


def of_folder(folder: Path, code: bool) -> str:
    """Return the identity of a model folder; `code`: Python code in it would be run, and so is a part of it."""
    return of_weights(weight_files(folder)) + _SEPARATOR + storage.digest(_others(folder, code))


def look(folder: Path, code: bool) -> str:
    """Return the digest of a glance at a model folder: its small files; names, sizes and pieces of weight files.

    Another model has another one, and so has a folder in which files are missing; `code` as in `of_folder`.
    """
    weights = ""
    for file in weight_files(folder):
        # Pieces from the start to the end of the file: all of a small one.
        size = file.stat().st_size
        read = []
        with file.open("rb") as stream:
            for offset in (*range(0, size, max(PIECE, size // PIECES)), max(0, size - PIECE)):
                stream.seek(offset)
                read.append(stream.read(PIECE))
        pieces = storage.digest(size, storage.digest_bytes(b"".join(read)))
        weights += f"{file.name}:{pieces}\n"
    return storage.digest(_others(folder, code), weights)


def of_weights(files: Sequence[Path]) -> str:
    return storage.digest("".join(f"{file.name}:{_digest_of_weights(file)}\n" for file in files))


def weights(identity: str) -> str:
    return identity.partition(_SEPARATOR)[0]


def has_weights(folder: Path, identity: str) -> bool:
    """True if a folder has the weights of a model with this identity, whatever its other files are."""
    # A copy from the hub may have the weights a second time, in a form of their maker.
    return weights(identity) in map(of_weights, (weight_files(folder), loaded_files(folder)))


def _others(folder: Path, code: bool) -> str:
    patterns = [*_PATTERNS]
    if code:
        patterns.append("*.py")
    files: set[Path] = set()
    for pattern in patterns:
        files.update(file for file in folder.glob(pattern) if file.is_file())
    lines = []
    for file in sorted(files):
        digest = storage.digest_file(file)
        tree = None
        if file.name in _CONFIGS:  # of a damaged file the loading will say so
            tree = records.parsed(file.read_bytes(), dict[str, Any])
        if tree is not None:
            for name in _UNIMPORTANT:
                tree.pop(name, None)
            digest = storage.digest_json(tree)
        lines.append(f"{file.relative_to(folder).as_posix()}:{digest}\n")
    return "".join(lines)


def _digest_of_weights(file: Path) -> str:
    # For a large file the digest is kept on this node while size and modification time are the same.
    info = file.stat()
    if info.st_size < KEPT_FROM:
        return storage.digest_file(file)
    key = storage.digest(file.resolve(), info.st_size, info.st_mtime_ns, length=32)
    path = storage.join(node_cache.CACHE, "digests", key)
    digest = node_cache.read(path)
    if not digest:
        digest = storage.digest_file(file)
        node_cache.keep(path, digest)  # a home that is read-only or full must not stop a run
    return digest


# Errors of libraries that read other people's files.


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Raise whatever a library raises about a model's files as the UserError `what: why`.

    These files decide which line of the library meets something unexpected, so no list of exceptions is complete.
    """
    try:
        yield
    except BaseException as error:
        # A panic of the Rust code of tokenizers or safetensors is no Exception.
        own = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not own or isinstance(error, UserError | ModuleNotFoundError):
            raise
        raise UserError(f"{what}: {why(error)}") from None


def whole_model(what: str, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """Return the causal language model that transformers loads, and the names of tensors that it does not have.

    Raise a UserError that begins with `what` if it does not load, or has no weights for a part of it.
    """
    # Any, because its type does not know output_loading_info.
    from_pretrained: Any = text_class(path).from_pretrained
    with foreign(what):
        model, report = from_pretrained(path, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{what}: it has no weights for {', '.join(missing[:3])}")
    return model, sorted(report["unexpected_keys"])


def text_class(folder: Path) -> Any:
    """Return the class of transformers that loads a folder's model for text; some take images too.

    Raise UserError for an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    # The folder of a GGUF file has no config.
    shape = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    kind = shape.get("model_type")
    if shape.get("is_encoder_decoder") is True:
        raise UserError(
            f"model.name: {folder} is an encoder-decoder ({kind}), which cannot be trained; name a causal language"
            " model"
        )
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in shape
    sees = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if sees and not causal:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def why(error: BaseException) -> str:
    """Return in one line why a model does not load; for code that is not trusted, also what to do."""
    if "Unrecognized configuration class" in str(error):
        return "transformers has no causal language model of its type; name a model that generates text"
    if "trust_remote_code" in str(error):
        return (
            "it needs its own Python code, which is not run; read that code, and if you trust it set"
            " model.trust_remote_code: true"
        )
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


# Messages about tensors that a model's files may have and its config does not describe.


def is_unknown_bias(model: Any, name: str) -> bool:
    """True if a name is of a bias that its layer could have, but does not have.

    The name may have the backbone's prefix or not.
    """
    owner, _, last = name.rpartition(".")
    if last != "bias":
        return False
    modules = dict(model.named_modules())
    module = modules.get(owner) or modules.get(f"{model.base_model_prefix}.{owner}")
    return module is not None and module._parameters.get("bias", module) is None


def unsupported_bias(model: Any, name: str) -> str:
    """Return what is wrong with a folder that has such a bias other than zero; follows "FOLDER " in a message."""
    return (
        f"has {name}, but config.json gives {type(model).__name__} no such bias, so it would be ignored;"
        " correct config.json (attention_bias, mlp_bias), or name a model whose files fit it"
    )


def unsupported_packing(name: str, kind: str) -> str:
    """Return what is wrong with a folder that has a tensor of 8 bits or less; follows "FOLDER " in a message."""
    return (
        f"has {name} as {kind}, but its config.json has no quantization_config that explains these numbers; name a"
        " model in bfloat16, float16 or float32"
    )
