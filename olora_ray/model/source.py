"""Resolver of `model.name` to a folder of safetensors with a digest.

`obtain` runs once, in the driver: whatever the name means (hub id, folder, package, GGUF file, registered
model), afterwards there is a folder with config.json, safetensors and tokenizer files, and a digest of
the weights. Workers and the export read that folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from olora_ray.common import digests, storage
from olora_ray.common.errors import UserError, as_user_error, first_line
from olora_ray.common.quiet import quiet_transformers
from olora_ray.config import paths
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model import convert


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk."""

    name: str
    """As the config names it."""
    folder: str
    """Local folder with config.json, safetensors and tokenizer files; see `on_this_node`."""
    digest: str
    """SHA-256 over the weights."""


def obtain(config: AnyConfig, registered: Path | None = None) -> BaseModel:
    """Find, download or convert the base model of a run; `registered` is the folder of a models:/ name.

    Raises UserError for a name that leads nowhere, a folder without safetensors, or a broken GGUF file.
    """
    quiet_transformers()
    name = config.model.name
    source = registered or _source_folder(config)
    if source.suffix == ".gguf":
        source = convert.gguf(source, config)
    elif not (source / "config.json").is_file():
        raise UserError(f"model.name: {source} has no config.json, so it is not a model folder")
    elif not list(source.glob("*.safetensors")):
        source = convert.pickled(source, config)
    return BaseModel(name, str(source), convert.digest(sorted(source.glob("*.safetensors"))))


def on_this_node(base: BaseModel, config: AnyConfig) -> BaseModel:
    """The base model where this process can read it: the driver's folder if this node sees it, else fetched anew.

    Raises UserError if it cannot be fetched here, or is not the same here.
    """
    if Path(base.folder).is_dir():
        return base
    if base.name.startswith("models:/") or Path(base.name).is_absolute():
        raise UserError(
            f"model.name: {base.folder} is not on every node; put it, or run.storage, where all nodes see it"
        )
    found = obtain(config)
    if found.digest != base.digest:
        raise UserError(
            f"model.name: {base.name} has other weights on this node than on the driver's; set model.revision"
        )
    return found


def _source_folder(config: AnyConfig) -> Path:
    name = config.model.name
    if name.startswith("package://"):
        return paths.package_file(name)
    if storage.is_uri(name):
        # Each address has a folder of its own: s3://a/model is not s3://b/model.
        key = digests.digest(name, length=16)
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
    what = f"model.name: {config.name}: not a folder here"
    with as_user_error(what, OSError, ValueError, RuntimeError, reason=_hub_problem):
        return Path(snapshot_download(config.name, revision=config.revision, allow_patterns=patterns))


def _hub_problem(error: BaseException) -> str:
    """Why the hub did not deliver a model: no such name, no access, or no answer."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return (
                "the model hub gives it to those only who were granted access: ask for that on its page, set HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return "the model hub has the model, but not this model.revision"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 404):  # 401: without a token it tells less
            return "the model hub has no model of this name, or it is private: correct the name, or set HF_TOKEN"
        case errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            why = first_line(error.__cause__)
            return f"the model hub cannot be asked ({why}), and this machine's cache does not have the model"
    return f"the model hub did not deliver it: {first_line(error)}"


def why(error: BaseException) -> str:
    """Why a model does not load, in one line; of code that is not trusted, what to do."""
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which is not run; read that code, and if you trust it set"
            " model.trust_remote_code: true"
        )
    return first_line(error)


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
