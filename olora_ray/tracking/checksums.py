"""Checksums of a version's files: written when it is registered, checked before it is promoted.

`checksums.json` lies beside the MLmodel and holds size and SHA-256 of every file of the logged model; its own
SHA-256 is a tag of the version, so it lives in MLflow's database and not beside the files.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from olora_ray.common import digests
from olora_ray.common.digests import size_and_digest
from olora_ray.common.errors import UserError
from olora_ray.tracking.client import is_unavailable, reason
from olora_ray.tracking.version import Version

FILE = "checksums.json"
TAG = "olora.checksums"


def of_folders(folders: dict[str, Path]) -> str:
    """The text of checksums.json; maps the place of a folder in the model ("" for its root) to the folder here."""
    files = {
        f"{place}/{file.relative_to(folder)}".lstrip("/"): size_and_digest(file)
        for place, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    return json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"


def digest(text: str) -> str:
    """Digest of checksums.json, for the version's tag."""
    return digests.digest(text)


def read(version: Version, place: str, tracking_uri: str) -> dict[str, dict[str, Any]]:
    """Name of each file of a version -> {bytes, sha256}; `place` is where its files lie.

    Raises UserError if the version has no checksums, or they are not those of its registration.
    """
    wanted = version.tags.get(TAG)
    if wanted is None:
        raise UserError(
            f"{version.name} version {version.number} has no checksums (tag {TAG}): it was registered by something"
            " else; register it with this project to have it promoted"
        )
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        text = _local(FILE, version, place, tracking_uri, Path(folder)).read_text(encoding="utf-8")
    if digest(text) != wanted:
        raise UserError(f"{version.name} version {version.number}: {FILE} is not that of its registration")
    files: dict[str, dict[str, Any]] = json.loads(text)["files"]
    return files


def verify(version: Version, place: str, tracking_uri: str) -> int:
    """Check every file of a version, one at a time; returns how many there are.

    Raises UserError that names the first file that is missing or has other content.
    """
    files = read(version, place, tracking_uri)
    for name, wanted in files.items():
        with tempfile.TemporaryDirectory(prefix="olora-") as folder:
            if size_and_digest(_local(name, version, place, tracking_uri, Path(folder))) != wanted:
                raise UserError(
                    f"{version.name} version {version.number}: {name} has other content than when it was registered;"
                    " it is not promoted"
                )
    return len(files)


def _local(name: str, version: Version, place: str, tracking_uri: str, folder: Path) -> Path:
    """The file on this machine: itself where it lies on a disk here, else downloaded into `folder`."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    root = Path(place.removeprefix("file://"))
    try:
        if root.is_absolute():
            found = root / name
        else:
            source = f"{place.rstrip('/')}/{name}"
            found = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=tracking_uri))
    except (MlflowException, OSError) as error:
        if is_unavailable(error):
            raise
        raise UserError(f"{version.name} version {version.number}: {name} cannot be read: {reason(error)}") from None
    if not found.is_file():
        raise UserError(f"{version.name} version {version.number}: {name} is missing at {place}")
    return found
