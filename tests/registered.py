"""Registered models with versions of one small file each, in a real MLflow: what a test of aliases needs."""

from pathlib import Path

from olora_ray.common.storage import digest
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.client import connect


def model(storage: Path, name: str, count: int) -> Aliases:
    """A model with `count` versions in the database of `storage`, without aliases."""
    found = Aliases(f"sqlite:///{storage}/mlflow.db", name)
    client = connect(found.uri)
    client.create_registered_model(name)
    for number in range(count):
        folder = storage / "files" / name / str(number)
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text(f"version {number}")
        text = checksums.of_folders({"": folder})
        (folder / checksums.FILE).write_text(text)
        client.create_model_version(name, str(folder), tags={checksums.TAG: digest(text)})
    return found
