"""Resolver of `model.name` to a folder of safetensors with a digest.

`obtain` runs once, in the driver. Whatever the name is (hub id, folder, package, GGUF file, registered model), the
result is a folder with config.json, safetensors and tokenizer files, and a digest of all of them. Workers and the
export read that folder.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, as_user_error, first_line, short_reason
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.retry import is_temporary
from olora_ray.config import command_line
from olora_ray.config.schema import AnyConfig
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model import folder


@dataclass(frozen=True)
class BaseModel:
    name: str
    """The name in the config."""
    folder: str
    """Local folder with config.json, safetensors and tokenizer files; see `on_this_node`."""
    digest: str
    """Digest of all files that decide what the model computes; the same for the same model."""
    look: str = ""
    """Digest of a glance at the folder (`folder.look`), by which each process compares its folder; empty: none
    compares."""

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "folder": self.folder, "digest": self.digest}

    def commit(self) -> str | None:
        """Return the commit of a model in the hub client's cache (models--ORG--NAME/snapshots/COMMIT), else None."""
        parts = Path(self.folder).parts
        if parts[-3:-1] == (f"models--{self.name.replace('/', '--')}", "snapshots"):
            return parts[-1]
        return None

    def shown(self) -> str:
        """Return the name, of a model of the hub with its commit."""
        commit = self.commit()
        if commit is None:
            return self.name
        return f"{self.name}@{commit}"


CONVERT = (
    "a model with pickled weights alone (pytorch_model*.bin) is not loaded; convert a model of the hub at"
    " https://huggingface.co/spaces/safetensors/convert and set model.revision to the pull request that it opens"
    " (refs/pr/N), or name another model"
)


def obtain(config: AnyConfig, registered: Path | None = None) -> BaseModel:
    """Find, download or convert the base model of a run; `registered` is the folder of a models:/ name.

    Raise UserError for a name without a model, a folder without safetensors or with files that are not valid
    (`folder.check`), or a broken GGUF file.
    """
    from olora_ray.model import convert  # with torch

    quiet_transformers()
    name = config.model.name
    source = registered or _source_folder(config)
    if source.suffix == ".gguf":
        source = convert.gguf(source, config)
    elif not command_line.is_there(source / folder.CONFIG):
        raise UserError(f"model.name: {source} has no config.json, so {_what_it_is(source)}")
    elif not folder.weight_files(source):
        raise UserError(f"model.name: {source} has no usable weights: no *.safetensors; {CONVERT}")
    folder.check_model(source)
    _keep(source)
    code = config.model.trust_remote_code
    return BaseModel(name, str(source), folder.of_folder(source, code), folder.look(source, code))


def glance(config: AnyConfig) -> str | None:
    """Identify the files that `obtain` would read, without torch; None if only `obtain` can tell which they are."""
    if config.model.name.startswith("models:/") or config.model.trust_remote_code:
        return None
    source = _source_folder(config)
    if source.is_file():
        return folder.of_weights([source])
    if not folder.weight_files(source):
        return None
    return folder.of_folder(source, code=False)


def is_found(config: AnyConfig) -> bool:
    """Look for the base model of a run without loading it; False if only the run can look.

    Raise UserError if there is no model of this name.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = config.model.name
    if name.startswith("models:/") or (storage.is_uri(name) and not name.startswith("package://")):
        return False
    source = _here(name)
    if source is None:
        # Suppressed where the hub is unreachable.
        with _asking_the_hub(config.model) as ask, contextlib.suppress(LocalEntryNotFoundError):
            source = ask(allow_patterns=[folder.CONFIG])
    if source and source.is_dir() and not (source / folder.CONFIG).is_file():
        raise UserError(f"model.name: {source} has no config.json, so {_what_it_is(source)}")
    return source is not None


def _what_it_is(source: Path) -> str:
    if not command_line.is_there(source / folder.ADAPTER):
        return "it is not a model folder"
    return (
        "it is an adapter, not a model; name its base model, or its merged model (export/merged of a run), or set"
        " train.start to a run's checkpoint"
    )


def _keep(source: Path) -> None:
    # A model in this node's cache is kept while this process lives; unused ones make room.
    root = Path(node_cache.CACHE) / "models"
    if root in source.parents:
        node_cache.hold(root / source.relative_to(root).parts[0])
        node_cache.make_room(root)


def on_this_node(base: BaseModel, config: AnyConfig) -> BaseModel:
    """Return the base model where this process can read it: in the driver's folder, otherwise fetched again.

    A folder that exists proves little: another process may still be downloading it, or a node's own disk may have
    another version. Raise UserError if it cannot be fetched here, or is not the same here.
    """
    path = Path(base.folder)
    same = False
    with contextlib.suppress(OSError):  # a file that was removed, or that this user may not read
        looks = ("", folder.look(path, config.model.trust_remote_code))
        same = path.is_dir() and base.look in looks
    if same:
        _keep(path)
        return base
    if base.name.startswith("models:/") or Path(base.name).is_absolute():
        problem = "is not on every node"
        if path.is_dir():
            problem = "has other files on this node than on the driver's node"
        raise UserError(
            f"model.name: {base.folder} {problem}; put it, or run.storage, where all nodes see it"
        )
    fetched = obtain(config)
    if fetched.digest != base.digest:
        raise UserError(
            f"model.name: {base.name} has other files on this node than on the driver's node; set model.revision"
        )
    return fetched


def _source_folder(config: AnyConfig) -> Path:
    name = config.model.name
    if storage.is_uri(name) and not name.startswith("package://"):
        with as_user_error(f"model.name: {name}", OSError, reason=short_reason):
            return node_cache.kept_copy(name, "models")
    source = _here(name)
    if source is not None:
        return source
    # README.md: the card has the license.
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
    if config.model.trust_remote_code:
        patterns.append("*.py")
    # A pattern's * matches folders too, which may have the same weights in other forms (gpt-oss: original/).
    # Mistral has its own form beside the weights.
    others = ["*/*.safetensors", "*/*.bin", "consolidated*.safetensors"]
    with _asking_the_hub(config.model) as ask:
        return ask(allow_patterns=patterns, ignore_patterns=others)


def _here(name: str) -> Path | None:
    """Return the model's path on this machine; None for a hub id."""
    if name.startswith("package://"):
        return command_line.package_file(name)
    path = command_line.at_home(name, "model.name")
    if command_line.is_there(path):
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"model.name: {name}: no such file or folder, and not a hub id (ORG/NAME)")
    return None


@contextlib.contextmanager
def _asking_the_hub(config: ModelConfig) -> Iterator[Callable[..., Path]]:
    """Yield a function that downloads some files of the model; raise its error as a UserError."""
    from huggingface_hub import snapshot_download

    what = f"model.name: {config.name}: not a folder here"
    # Exception: its client's errors about a broken connection are of no type of the standard library.
    with as_user_error(what, Exception, reason=_hub_problem, passes=is_temporary):
        yield lambda **files: Path(
            snapshot_download(config.name, revision=config.revision, **files)
        )


def _hub_problem(error: BaseException) -> str:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return "the model hub grants access to it on request: request it on the model's page, then set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return "the model hub has the model, but not this model.revision"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 404):
            # 401 is the answer without a token.
            return "the model hub has no model of this name, or it is private: correct the name, or set HF_TOKEN"
        case errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            why = first_line(error.__cause__)
            return f"the model hub is unreachable ({why}), and this machine's cache does not have the model"
    return f"the model hub did not deliver it: {first_line(error)}"
