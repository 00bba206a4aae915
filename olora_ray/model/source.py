"""Resolver of `model.name` to a folder of safetensors with a digest.

`obtain` runs once, in the driver: whatever the name means (hub id, folder, package, GGUF file, registered
model), afterwards there is a folder with config.json, safetensors and tokenizer files, and a digest of
all of them. Workers and the export read that folder.
"""

from dataclasses import dataclass
from pathlib import Path

from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, as_user_error, first_line, short_reason
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.patience import is_away
from olora_ray.config import command_line
from olora_ray.config.schema import AnyConfig
from olora_ray.config.schema import Model as ModelConfig
from olora_ray.model import folder


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk."""

    name: str
    """As the config names it."""
    folder: str
    """Local folder with config.json, safetensors and tokenizer files; see `on_this_node`."""
    digest: str
    """Of all its files that decide what it computes; the same model has the same."""
    look: str = ""
    """What a glance at the folder tells (`folder.look`), so that each process can compare; empty: none does."""

    def to_json(self) -> dict[str, str]:
        """For a result: which model it was."""
        return {"name": self.name, "folder": self.folder, "digest": self.digest}


def obtain(config: AnyConfig, registered: Path | None = None) -> BaseModel:
    """Find, download or convert the base model of a run; `registered` is the folder of a models:/ name.

    Raises UserError for a name that leads nowhere, a folder without safetensors or with files that do not hold
    (`folder.check`), or a broken GGUF file.
    """
    from olora_ray.model import convert  # with torch

    quiet_transformers()
    name = config.model.name
    source = registered or _source_folder(config)
    if source.suffix == ".gguf":
        source = convert.gguf(source, config)
    elif not command_line.is_there(source / folder.CONFIG, "model.name"):
        raise UserError(f"model.name: {source} has no config.json, so {_what_it_is(source)}")
    elif not folder.weight_files(source):
        source = convert.pickled(source, config)
    folder.check(source)
    _keep(source)
    code = config.model.trust_remote_code
    return BaseModel(name, str(source), folder.of_folder(source, code), folder.look(source, code))


def glance(config: AnyConfig) -> str | None:
    """Identify the files that `obtain` would read, without torch; None where it alone can tell which they are."""
    if config.model.name.startswith("models:/") or config.model.trust_remote_code:
        return None
    source = _source_folder(config)
    if source.is_file():
        return folder.of_weights([source])
    return folder.of_folder(source, code=False) if folder.weight_files(source) else None


def _what_it_is(source: Path) -> str:
    if not command_line.is_there(source / folder.ADAPTER, "model.name"):
        return "it is not a model folder"
    return (
        "it is an adapter, not a model; name its base, or its merged model (export/merged of a run); train.start takes"
        " a checkpoint of a run to train on from"
    )


def _keep(source: Path) -> None:
    """Of a model in this node's cache: keep it while this process lives, and make room where others are."""
    root = Path(node_cache.CACHE) / "models"
    if root in source.parents:
        node_cache.hold(root / source.relative_to(root).parts[0])
        node_cache.make_room(root, (entry for entry in root.iterdir() if not entry.name.startswith(".")))


def on_this_node(base: BaseModel, config: AnyConfig) -> BaseModel:
    """The base model where this process can read it: the driver's folder if this node sees it, else fetched anew.

    That a folder is there says little: one of the hub's is from its first file on, while another process fetches the
    rest, and one on a node's own disk may be another version. Raises UserError if it cannot be fetched here, or is not
    the same here.
    """
    place = Path(base.folder)
    if _is_same(place, base, config):
        _keep(place)
        return base
    if base.name.startswith("models:/") or Path(base.name).is_absolute():
        what = "has other files on this node than on the driver's" if place.is_dir() else "is not on every node"
        raise UserError(f"model.name: {base.folder} {what}; put it, or run.storage, where all nodes see it")
    found = obtain(config)
    if found.digest != base.digest:
        raise UserError(
            f"model.name: {base.name} has other files on this node than on the driver's; set model.revision"
        )
    return found


def _is_same(place: Path, base: BaseModel, config: AnyConfig) -> bool:
    """Whether a folder of this node is that of the driver, as far as a glance tells."""
    try:
        return place.is_dir() and base.look in ("", folder.look(place, config.model.trust_remote_code))
    except OSError:  # a file that is gone by now, or closed to this user
        return False


def _source_folder(config: AnyConfig) -> Path:
    name = config.model.name
    if name.startswith("package://"):
        return command_line.package_file(name)
    if storage.is_uri(name):
        with as_user_error(f"model.name: {name}", OSError, reason=short_reason):
            # A folder for each address and what lies there now: a model may be replaced by another.
            key = storage.digest(name, storage.version(name), length=16)
            return node_cache.local_copy(name, f"{node_cache.CACHE}/models/{key}")
    path = command_line.at_home(name, "model.name")
    if command_line.is_there(path, "model.name"):
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
    # A pattern's * goes through folders too, and there lie the same weights in other forms (gpt-oss: original/);
    # Mistral's lie beside them.
    others = ["*/*.safetensors", "*/*.bin", "consolidated*.safetensors"]
    what = f"model.name: {config.name}: not a folder here"
    # Exception: its client's errors about a broken connection are of no kind that Python knows.
    with as_user_error(what, Exception, reason=_hub_problem, passes=is_away):
        return Path(
            snapshot_download(config.name, revision=config.revision, allow_patterns=patterns, ignore_patterns=others)
        )


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
