"""From models:/NAME@ALIAS or models:/NAME/VERSION to files on this machine, checked against their checksums."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from olora_ray.common import storage
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.storage import digest
from olora_ray.config.schema import AnyConfig
from olora_ray.tracking import checksums, models, start
from olora_ray.tracking.checksums import Version, name_filter
from olora_ray.tracking.client import connect, is_unavailable, reachable
from olora_ray.tracking.models import ADAPTER_PLACE, BaseOfAdapter
from olora_ray.tracking.start import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

SCHEME = "models:/"
_BASE = TypeAdapter(BaseOfAdapter)


@dataclass(frozen=True)
class Registered:
    """A version of a registered model on this machine."""

    version: Version
    folder: Path
    """With config.json and safetensors; of an adapter-only version the adapter in PEFT's form, with tokenizer."""
    base: BaseOfAdapter | None
    """Of an adapter-only version."""


def find(uri: str, tracking_uri: str, cache: Path | None = None) -> Registered:
    """The version that `uri` names.

    Where the artifacts lie on this machine's disks its folder is they themselves; else they are downloaded
    once into `cache` (~/.cache/olora_ray). Raises UserError for a name, alias or version that is not
    there, with those that are, and for files that are not those of its registration.
    """
    with reachable(tracking_uri, upload=True):
        version = Version.of(_resolve(connect(tracking_uri), uri))
        place = str(connect(tracking_uri).get_model_version_download_uri(version.name, version.number))
        return _inside(uri, version, _checked(version, place, tracking_uri, cache))


def of_config(config: AnyConfig) -> Registered | None:
    """The registered version that a config names as its model (models:/...) in this run's MLflow; else None."""
    if not config.model.name.startswith(SCHEME):
        return None
    start.follow(config)
    return find(config.model.name, resolve_uri(config), cache(config))


def cache(config: AnyConfig) -> Path | None:
    """Where files of a registered model are kept: under the storage, so that the workers see them too."""
    return None if storage.is_uri(config.run.storage) else Path(config.run.storage)


def cached(cache: Path | None, key: str) -> Path:
    """The folder of a registered model's files in `cache`, by a hash of what they are."""
    return (cache or Path.home() / ".cache" / "olora_ray") / "models" / key


def pinned(name: str, config: AnyConfig) -> str:
    """The name of a base, of models:/NAME@ALIAS that of the version: an alias moves.

    If it has moved since the base was opened the name is wrong, and who follows it sees that by the digest.
    """
    if not name.startswith(SCHEME) or "@" not in name:
        return name
    with reachable(resolve_uri(config)):
        version = Version.of(_resolve(connect(resolve_uri(config)), name))
    return f"{SCHEME}{version.name}/{version.number}"


def _checked(version: Version, place: str, tracking_uri: str, cache: Path | None) -> Path:
    copy = cached(cache, digest(tracking_uri, place, length=16))
    folder = _fetch(place, tracking_uri, copy)
    try:
        _verify(version, folder, tracking_uri)
    except UserError:
        if folder != copy:
            raise
        storage.remove(str(copy))  # is it the copy alone that is damaged?
        folder = _fetch(place, tracking_uri, copy)
        _verify(version, folder, tracking_uri)
    return folder


def _inside(uri: str, version: Version, folder: Path) -> Registered:
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return Registered(version, candidate, None)
    if not (folder / ADAPTER_PLACE / "adapter_config.json").is_file():
        raise UserError(f"model.name: {uri} is registered, but has no config.json: it is not a transformers model")
    return Registered(version, folder / ADAPTER_PLACE, _base(uri, folder))


def _base(uri: str, folder: Path) -> BaseOfAdapter:
    from mlflow.models import Model

    try:
        return _BASE.validate_python((Model.load(str(folder / models.FILE)).metadata or {})[models.BASE])
    except Exception:  # others may have written anything
        raise UserError(
            f"model.name: {uri} is an adapter that was registered by something else, so its base model cannot be"
            " checked; register it with this project, or merged into its base"
        ) from None


def _verify(version: Version, folder: Path, tracking_uri: str) -> None:
    if checksums.TAG in version.tags:
        checksums.verify(version, str(folder), tracking_uri)
    else:
        logger.warning(
            f"model.name: {version.name} version {version.number} was registered by something else and has no"
            " checksums: its files are not checked"
        )


def _resolve(client: "MlflowClient", uri: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    words = uri.removeprefix(SCHEME).strip("/")
    name, at, alias = words.partition("@")
    if not at:
        name, _, number = words.rpartition("/")
    if not uri.startswith(SCHEME) or not name or not (alias if at else number.isdigit()):
        raise UserError(f"model.name: {uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        return client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
    except MlflowException as error:
        if is_unavailable(error):
            raise
        raise UserError(f"model.name: {uri}: {_what_there_is(client, name, error)}") from None


def _what_there_is(client: "MlflowClient", name: str, error: Exception) -> str:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
        versions = [str(item.version) for item in client.search_model_versions(name_filter(name))]
    except MlflowException as missing:
        if missing.error_code == "RESOURCE_DOES_NOT_EXIST":
            return f"no model {name!r} is registered in the tracking server"
        return first_line(error)
    named = ", ".join(f"@{alias} = {version}" for alias, version in aliases.items()) or "none"
    return f"not registered; {name} has versions {', '.join(sorted(versions, key=int)) or 'none'} and aliases {named}"


def _fetch(place: str, tracking_uri: str, target: Path) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    local = Path(place.removeprefix("file://"))
    if local.is_absolute():
        if not local.is_dir():
            raise UserError(f"model.name: the registered model's files are not at {local} on this machine")
        return local
    if target.is_dir():
        return target
    try:
        with (
            storage.staged(target) as folder,
            tempfile.TemporaryDirectory(prefix=".olora-", dir=target.parent) as parts,
        ):
            downloads = str(Path(parts) / "files")
            Path(download_artifacts(artifact_uri=place, dst_path=downloads, tracking_uri=tracking_uri)).replace(folder)
    except (MlflowException, OSError) as error:
        if target.is_dir():  # another process of this node was faster
            return target
        if is_unavailable(error):
            raise
        raise UserError(f"model.name: cannot download {place}: {first_line(error)}") from None
    return target
