"""Checksums of a version's files: written when it is registered, checked before it is promoted and when it is loaded.

`checksums.json` lies beside the MLmodel and holds size and SHA-256 of every file of the logged model; its own
SHA-256 is a tag of the version, so it lives in MLflow's database and not beside the files. It is the exact set: a
file that somebody has added is refused like one that was changed, because transformers reads files such as
adapter_config.json or chat_template.jinja by itself wherever it finds them.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.storage import size_and_digest
from olora_ray.tracking.client import is_unavailable, reason

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

RUN = "olora.run_folder"
"""Tag of a version: the folder of the run that made it."""
SETTINGS = "olora.settings_digest"
"""Tag of a version: what it was trained with. A run that is made longer has a version of each length."""

# A version of a registered model, as the rest of the project sees it.


def name_filter(name: str) -> str:
    """MLflow's filter for the versions of a model; raises UserError for a name that MLflow cannot have."""
    if not name.strip() or "/" in name or ":" in name or ("'" in name and '"' in name):
        raise UserError(f"{name!r} is no name of a registered model: MLflow has none with '/' or ':', or both quotes")
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


@dataclass(frozen=True)
class Version:
    """One version, with its tags as they were when it was read."""

    name: str
    """Of the registered model."""
    number: str
    tags: Mapping[str, str]
    run_id: str | None = None
    """The MLflow run that registered it."""
    created: float = 0.0
    """Seconds since 1970."""

    @classmethod
    def of(cls, found: "ModelVersion") -> "Version":
        """MLflow's version as ours."""
        seconds = (found.creation_timestamp or 0) / 1000
        return cls(found.name, str(found.version), dict(found.tags), found.run_id, seconds)


FILE = "checksums.json"
TAG = "olora.checksums"
FROM_MLFLOW = frozenset({"registered_model_meta"})
"""Files that MLflow itself adds beside the MLmodel where it loads a version from; nobody reads a model from them."""

Files = Mapping[str, Mapping[str, Any]]
"""Name of each file of a version -> {bytes, sha256}."""


def of_folders(folders: dict[str, Path]) -> str:
    """The text of checksums.json; maps the place of a folder in the model ("" for its root) to the folder here."""
    files = {
        f"{place}/{file.relative_to(folder)}".lstrip("/"): size_and_digest(file)
        for place, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    return json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"


def read(version: Version, place: str, tracking_uri: str) -> Files:
    """The checksums of a version; `place`, a URI or a folder here, is where its files lie.

    Raises UserError if the version has no checksums, or they are not those of its registration.
    """
    wanted = version.tags.get(TAG)
    if wanted is None:
        raise UserError(
            f"{_name(version)} has no checksums (tag {TAG}): it was registered by something else; register it with"
            " this project to have it promoted"
        )
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        content = _local(FILE, version, place, tracking_uri, Path(folder)).read_bytes()
    if storage.digest_bytes(content) != wanted:
        raise UserError(f"{_name(version)}: {FILE} is not that of its registration")
    try:
        files: dict[str, dict[str, Any]] = json.loads(content.decode())["files"]
        if not all(each.keys() == {"bytes", "sha256"} and _inside(name) for name, each in files.items()):
            raise ValueError("names without bytes and sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{_name(version)}: {FILE} is no list of files with bytes and sha256") from None
    return files


def verify(version: Version, place: str, tracking_uri: str) -> int:
    """Check that a version has the files of its registration and no others; returns how many there are.

    Each is read, one at a time. Raises UserError that names the first that is added, missing or changed.
    """
    files = read(version, place, tracking_uri)
    _refuse_added(version, _listed(version, place, tracking_uri), files.keys() | {FILE} | FROM_MLFLOW)
    for name, wanted in files.items():
        with tempfile.TemporaryDirectory(prefix="olora-") as folder:
            if size_and_digest(_local(name, version, place, tracking_uri, Path(folder))) != wanted:
                raise UserError(
                    f"{_name(version)}: {name} has other content than when it was registered; it is not used"
                )
    return len(files)


def verify_copy(version: Version, place: str, tracking_uri: str, folder: Path) -> None:
    """Check that `folder`, a copy of the merged model elsewhere, is what the version was registered with.

    Raises UserError as `verify`.
    """
    inner = "model/"
    listed = read(version, place, tracking_uri).items()
    files = {name.removeprefix(inner): wanted for name, wanted in listed if name.startswith(inner)}
    _refuse_added(version, _below(folder), files)
    for name, wanted in files.items():
        if not (folder / name).is_file() or size_and_digest(folder / name) != wanted:
            raise UserError(f"{_name(version)}: {folder / name} is not the file that was registered; it is not used")


def _refuse_added(version: Version, found: Iterable[str], known: Iterable[str]) -> None:
    if added := sorted(set(found) - set(known)):
        raise UserError(
            f"{_name(version)}: {added[0]} was added since it was registered; remove it, or register the model anew"
        )


def _listed(version: Version, place: str, tracking_uri: str) -> list[str]:
    """The names of all files of a version."""
    from mlflow.artifacts import list_artifacts
    from mlflow.exceptions import MlflowException

    if (root := _root(place)) is not None:
        return _below(root)
    found, folders = list[str](), [""]
    try:
        while folders:
            inner = folders.pop()
            address = f"{place.rstrip('/')}/{inner}".rstrip("/")
            for item in list_artifacts(artifact_uri=address, tracking_uri=tracking_uri):
                name = f"{inner}/{item.path.rstrip('/').rpartition('/')[2]}".lstrip("/")
                (folders if item.is_dir else found).append(name)
    except (MlflowException, OSError) as error:
        if is_unavailable(error):
            raise
        raise UserError(f"{_name(version)}: its files at {place} cannot be listed: {reason(error)}") from None
    return found


def _below(root: Path) -> list[str]:
    """The names of all files and links below a folder."""
    return [
        str((Path(folder) / name).relative_to(root))
        for folder, folders, files in os.walk(root)
        for name in [*files, *(each for each in folders if (Path(folder) / each).is_symlink())]
    ]


def _local(name: str, version: Version, place: str, tracking_uri: str, folder: Path) -> Path:
    """The file on this machine: itself where it lies on a disk here, else downloaded into `folder`."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        if (root := _root(place)) is not None:
            found = root / name
        else:
            source = f"{place.rstrip('/')}/{name}"
            found = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=tracking_uri))
    except (MlflowException, OSError) as error:
        if is_unavailable(error):
            raise
        raise UserError(f"{_name(version)}: {name} cannot be read: {reason(error)}") from None
    if not found.is_file():
        raise UserError(f"{_name(version)}: {name} is missing at {place}")
    return found


def _root(place: str) -> Path | None:
    """The folder on this machine, if the place is one."""
    root = Path(place.removeprefix("file://"))
    return root if root.is_absolute() else None


def _inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def _name(version: Version) -> str:
    return f"{version.name} version {version.number}"
