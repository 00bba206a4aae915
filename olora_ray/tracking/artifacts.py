"""MLflow's artifact store: where the files of an experiment go, and whether they can be written there.

MLflow finds that out at its first file, which is at the end of a training, and asks an object store for minutes.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from olora_ray.common import connections, s3, storage
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.tracking import moved_storage
from olora_ray.tracking.client import TrackingUnavailable, is_unavailable, reason, shown_uri

PROBE_SECONDS = 30.0
PROBE = ".probe"
FIELD = "MLflow's artifact store"


def default_place(config: AnyConfig) -> str:
    """Where the files of a new experiment go if no server says so: beside the storage."""
    place = config.run.storage
    return storage.join(place if storage.is_uri(place) else os.path.abspath(place), moved_storage.FOLDER)


def check(place: str, uri: str) -> None:
    """Write and delete a file in the artifact store at `place` of the MLflow at `uri`; a local folder is looked at.

    Raises UserError that says what to mend, or TrackingUnavailable if it does not answer, within PROBE_SECONDS.
    """
    if (folder := storage.local_path(place)) is not None:
        _look_at(folder, uri)
        return
    use_paths()
    if s3.is_s3(place) and not os.environ.get("MLFLOW_S3_ENDPOINT_URL"):
        storage.check(place, FIELD)
    with _told(place):
        _within(PROBE_SECONDS, place, uri)


def _look_at(folder: Path, uri: str) -> None:
    """Raise UserError for a folder that is the server's own, on another machine, or that cannot be written; makes none.

    A server that passes no files on names a folder, and MLflow makes that wherever the client runs.
    """
    if _is_elsewhere(uri) and not (os.path.exists(folder) or os.path.exists(folder.parent)):
        raise UserError(
            f"{FIELD}: the server at {shown_uri(uri)} keeps files in its folder {folder}, which is not there on this"
            " machine: models would be written here, where nobody finds them; start it with --artifacts-destination"
            " and without --no-serve-artifacts, and set another tracking.experiment, since one that is there keeps its"
            " folder; or, if the folder is a shared one, make it here"
        )
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{FIELD}: {folder} cannot be written: {there} is no folder in which this user may write")


def _is_elsewhere(uri: str) -> bool:
    """Whether MLflow is a server that may run on another machine than this one."""
    host = urlsplit(uri).hostname or ""
    return uri.startswith(("http://", "https://")) and host not in ("localhost", "::1") and not host.startswith("127.")


def use_paths() -> None:
    """Let MLflow address buckets as the rest of this project does: by path, where the S3 store is not AWS."""
    if connections.s3_endpoint():
        os.environ.setdefault("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "path")


def _within(seconds: float, place: str, uri: str) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            _write(place, uri)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="artifacts", daemon=True)  # a call that hangs does not hold up the end
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if failed:
        raise failed[0]


def _write(place: str, uri: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository: Any = get_artifact_repository(place, tracking_uri=uri)
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        file = Path(folder) / PROBE
        file.write_text("probe")
        repository.log_artifact(str(file))
    with contextlib.suppress(Exception):  # who may write need not be allowed to delete
        repository.delete_artifacts(PROBE)


@contextlib.contextmanager
def _told(place: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{FIELD}: {place} needs the Python package {error.name}: pip install {error.name}") from None
    except Exception as error:
        kind = TrackingUnavailable if is_unavailable(error) else UserError
        raise kind(f"{FIELD}: {place} cannot be written: {reason(error)}") from None
