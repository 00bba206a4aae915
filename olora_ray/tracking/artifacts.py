"""MLflow's artifact store: a test, before a training, that it takes files.

MLflow writes the model at the end of a training, and asks a store that does not answer for minutes. Where the files go,
through which servers and proxies, only MLflow knows. So the test writes one file through MLflow itself.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olora_ray.common import connections, s3, storage
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.tracking import moved_storage
from olora_ray.tracking.client import TrackingUnavailable, is_unavailable, reason, shown_uri
from olora_ray.tracking.remedy import remedy

PROBE = ".probe"
PROBE_BYTES = 4 * 2**20
"""More than a proxy takes by default: 1 MB, for nginx."""
PROBE_SECONDS = 30.0
FIELD = "MLflow's artifact store"


def default_place(config: AnyConfig) -> str:
    """Return where the files of a new experiment lie if MLflow is a database: beside the storage."""
    place = config.run.storage
    return storage.join(place if storage.is_uri(place) else os.path.abspath(place), moved_storage.FOLDER)


def check(place: str, uri: str) -> None:
    """Write and delete a file of PROBE_BYTES at `place`, an experiment's artifact location in the MLflow at `uri`.

    Raises UserError that says what to mend, or TrackingUnavailable if the store does not answer, within PROBE_SECONDS.
    """
    use_paths()
    if s3.is_s3(place) and not os.environ.get("MLFLOW_S3_ENDPOINT_URL"):
        storage.check(place, FIELD)
    with _told(place, uri):
        _within(PROBE_SECONDS, place, uri)


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
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    repository: Any = get_artifact_repository(place, tracking_uri=uri)
    if uri.startswith("http") and isinstance(repository, LocalArtifactRepository):
        _refuse_a_folder_of_the_server(Path(repository.artifact_dir), uri)
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        file = Path(folder) / PROBE
        file.write_bytes(os.urandom(PROBE_BYTES))
        repository.log_artifact(str(file))
    with contextlib.suppress(Exception):  # who may write need not be allowed to delete
        repository.delete_artifacts(PROBE)


def _refuse_a_folder_of_the_server(folder: Path, uri: str) -> None:
    """Raise UserError for a server that names a folder which is not there on this machine.

    MLflow's client would make it here, and nobody would find the model.
    """
    if not folder.exists() and not folder.parent.exists():
        raise UserError(
            f"{FIELD}: the server at {shown_uri(uri)} keeps files in its folder {folder}, which is not there on this"
            " machine. If it is a shared folder, mount it here. Otherwise start the server with --artifacts-destination"
            " and without --no-serve-artifacts, and set another tracking.experiment: an experiment keeps its folder"
        )


@contextlib.contextmanager
def _told(place: str, uri: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{FIELD}: {place} needs the Python package {error.name}: pip install {error.name}") from None
    except Exception as error:
        text = remedy(error)
        kind = TrackingUnavailable if text is None and is_unavailable(error) else UserError
        why = f"{text} ({reason(error)})" if text else reason(error)
        raise kind(f"{FIELD}: {place} at {shown_uri(uri)} cannot be written: {why}") from None
