"""Start of an MLflow run: its address, its experiment, and the new or resumed run."""

import contextlib
import getpass
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from olora_ray.common import node_cache, retry, storage
from olora_ray.common.errors import TakenOver, TryAgain, UserError
from olora_ray.common.secrets import in_uri, looked_up
from olora_ray.config import command_line
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.tracking.client import (
    TrackingUnavailable,
    check_uri,
    connect,
    existing,
    is_unavailable,
    reachable,
    reason,
    remedy,
    shown_uri,
)
from olora_ray.tracking.moved_storage import DATABASE, FOLDER, refuse_moved
from olora_ray.tracking.run import TAG_LENGTH, Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# MLflow's artifact store: before a training, a test file is written to it.

PROBE = ".probe"
# Larger than the default limit of a proxy (nginx: 1 MB).
PROBE_BYTES = 4 * 2**20
PROBE_SECONDS = 30.0
FIELD = "MLflow's artifact store"


def probe(place: str, uri: str) -> None:
    """Write and delete a file of PROBE_BYTES at `place`, the artifact location of an experiment in the MLflow at `uri`.

    Raises UserError with the remedy, or TrackingUnavailable if the store does not answer within PROBE_SECONDS.
    """
    use_paths()
    if place.startswith("s3://") and not os.environ.get("MLFLOW_S3_ENDPOINT_URL"):
        storage.check_storage(place, FIELD)
    failed: list[Exception] = []

    def work() -> None:
        try:
            _write(place, uri)
        except Exception as error:
            failed.append(error)

    # A daemon, because a hanging call must not keep the process alive.
    thread = threading.Thread(target=work, name="artifacts", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        failed.append(TimeoutError(f"no answer within {PROBE_SECONDS:g} s"))
    for error in failed:
        if isinstance(error, UserError):
            raise error
        if isinstance(error, ModuleNotFoundError):
            raise UserError(
                f"{FIELD}: {place} needs the Python package {error.name}: pip install {error.name}"
            )
        problem = f"{FIELD}: {place} at {shown_uri(uri)} cannot be written"
        text = remedy(error)
        if text:
            raise UserError(f"{problem}: {text} ({reason(error)})")
        error_type = TrackingUnavailable if is_unavailable(error) else UserError
        raise error_type(f"{problem}: {reason(error)}")


def use_paths() -> None:
    """Let MLflow address buckets by path if the S3 store is not AWS, like the rest of this project."""
    if retry.s3_endpoint():
        os.environ.setdefault("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "path")


def _write(location: str, uri: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    repository: Any = get_artifact_repository(location, tracking_uri=uri)
    if uri.startswith("http") and isinstance(repository, LocalArtifactRepository):
        _refuse_a_folder_of_the_server(Path(repository.artifact_dir), uri)
    with tempfile.TemporaryDirectory(prefix="olora-") as folder:
        file = Path(folder) / PROBE
        file.write_bytes(os.urandom(PROBE_BYTES))
        repository.log_artifact(str(file))
    with contextlib.suppress(Exception):  # the credentials may allow writing, but not deleting
        repository.delete_artifacts(PROBE)


def _refuse_a_folder_of_the_server(folder: Path, uri: str) -> None:
    # MLflow's client would create the server's folder on this machine, where nobody looks for the model.
    if not folder.exists() and not folder.parent.exists():
        raise UserError(
            f"{FIELD}: the server at {shown_uri(uri)} keeps files in its folder {folder}, which is missing on this"
            " machine. If it is a shared folder, mount it here. Otherwise start the server with --artifacts-destination"
            " and without --no-serve-artifacts, and set another tracking.experiment: an experiment keeps its folder"
        )


# The environment variable from which MLflow itself takes its address.
VARIABLE = "MLFLOW_TRACKING_URI"


def resolve_uri(config: AnyConfig) -> str:
    """Return the address of MLflow: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the storage.

    Makes a relative SQLite path absolute (see `absolute`). The address may contain a password: show it with `shown_uri`
    only. Raises UserError if nothing is set and the storage is a URI, or if env:NAME or file:/PATH cannot be read.
    """
    uri = os.environ.get(VARIABLE)
    if config.tracking.uri:
        uri = looked_up(config.tracking.uri, "tracking.uri") or uri
    if uri:
        return absolute(uri)
    if storage.is_uri(config.run.storage):
        raise UserError(
            f"tracking.uri: not set, and run.storage={config.run.storage} cannot hold a database; set"
            " tracking.uri to an MLflow server, http://HOST:PORT, or to sqlite:////PATH/mlflow.db"
        )
    return f"sqlite:///{os.path.abspath(config.run.storage)}/mlflow.db"


def everywhere(config: AnyConfig) -> str:
    """Return a `tracking.uri` that means this MLflow in other processes, whatever their folder and environment.

    An address with a secret is returned as its env: or file: reference, which every node must have. Raises UserError as
    `resolve_uri` does.
    """
    uri = resolve_uri(config)
    if in_uri(uri):
        return config.tracking.uri or f"env:{VARIABLE}"
    return uri


def absolute(uri: str) -> str:
    """Return the address with an absolute SQLite path, because workers run in another folder."""
    if not uri.startswith("sqlite:///") or uri.startswith(("sqlite:////", "sqlite:///:memory:")):
        return uri
    # A submitted job has its own folder, which is deleted after the job. So the path is made relative to the folder of
    # a relative run.storage, to keep the runs and registered models.
    here = Path.cwd()
    path = command_line.absolute(uri.removeprefix("sqlite:///"), command_line.lasting(here))
    if command_line.lasting(here) != here:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    return f"sqlite:///{path}"


def chosen_uri(given: str | None) -> str:
    """Return MLflow's address for a command without a config; `given` is the value of --tracking-uri."""
    if given and in_uri(given):
        raise UserError(
            "--tracking-uri: its secret is visible to all on this machine; use env:NAME or file:/PATH"
        )
    uri = os.environ.get(VARIABLE) if given is None else given
    if uri:
        return absolute(looked_up(uri, "--tracking-uri"))
    database = Path("runs", DATABASE)
    if given is None and database.is_file():
        return f"sqlite:///{database.resolve()}"
    raise UserError(
        "--tracking-uri: not set, and this folder has no runs/mlflow.db yet, which the first training makes; set it to"
        " MLflow's address, or set MLFLOW_TRACKING_URI"
    )


def check_artifacts(config: Config, uri: str) -> None:
    """Raise UserError within seconds if the config's experiment accepts no files, or the server no logged models.

    Creates the experiment at `uri` if it is missing. Raises TrackingUnavailable if MLflow or the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    with reachable(uri):
        client = connect(uri)
        experiment = _experiment(client, config, uri)
        # A server of MLflow 2 accepts runs, but refuses the model at their end.
        try:
            client.search_logged_models([experiment], max_results=1)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            raise UserError(
                f"tracking.uri={shown_uri(uri)}: this server is older than MLflow 3 and cannot store models;"
                " upgrade it, or set another server"
            ) from None
        location = str(client.get_experiment(experiment).artifact_location)
    probe(location, uri)


def start_run(
    config: AnyConfig, run_name: str, tags: Mapping[str, str], run_id: str | None = None
) -> "Tracker":
    """Create the run (and its experiment if needed), or resume `run_id` if it still exists.

    Call it in one process, the driver: processes that open a new database at the same time collide. Raises UserError
    for a deleted experiment or a wrong address. If the server does not answer, a new run raises TrackingUnavailable; a
    run with a `run_id` is resumed as soon as the server answers.
    """
    uri = resolve_uri(config)
    use_paths()
    try:
        check_uri(uri)
        with reachable(uri):
            client = connect(uri)
            experiment = _experiment(client, config, uri)
            if run_id is not None:
                former = existing(client.get_run, run_id)
                if former is not None and former.info.lifecycle_stage == "active":
                    client.update_run(run_id, status="RUNNING")
                    return Tracker(uri, run_id)
                logger.warning(
                    f"MLflow run {run_id} no longer exists: the rest of this run is logged to a new MLflow run"
                )
            every = {**_context_tags(), **tags}
            texts = {name: text[:TAG_LENGTH] for name, text in every.items()}
            run = client.create_run(experiment, tags=texts, run_name=run_name)
            return Tracker(uri, run.info.run_id, fresh=True)
    except TrackingUnavailable:
        if run_id is None:
            raise
    tracker = Tracker(uri, run_id)
    tracker.reopen()
    return tracker


def _experiment(client: "MlflowClient", config: AnyConfig, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server has its own place for artifacts. A database has it beside the storage: without one, MLflow would use
        # the current folder.
        place = None
        if not uri.startswith(("http://", "https://", "databricks")):
            root = config.run.storage
            place = storage.join(root if storage.is_uri(root) else os.path.abspath(root), FOLDER)
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            # Another driver may have created it meanwhile.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise UserError(f"tracking.experiment={name}: {reason(error)}") from None
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment: {name!r} was deleted in MLflow; restore it there, or set another name"
        )
    if uri == f"sqlite:///{os.path.abspath(config.run.storage)}/{DATABASE}":
        refuse_moved(str(experiment.artifact_location), uri)
    return str(experiment.experiment_id)


# Tags of a run and of a version: a digest of this project's code, its commit, the image, and who started it where.
CODE = "olora.code"
COMMIT = "olora.commit"
IMAGE = "olora.image"
SUBMITTER = "olora.submitted_by"
# Suffix of a commit whose checkout has changes that are not committed.
CHANGED = "+changes"


def commit(folder: Path) -> str:
    """Return the commit of the git checkout that contains `folder`, with CHANGED if it has changes; else empty."""
    # From git itself, because GitPython, which MLflow uses, warns if git is missing.
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", f"--dirty={CHANGED}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        silent = subprocess.DEVNULL
        return subprocess.check_output(git, cwd=folder, text=True, stderr=silent).strip()
    return ""  # no git, or no checkout: an image, or a submitted job


def submitter() -> str:
    """Return who started this process: OLORA_SUBMITTER, which deploy/submit.py sets, else USER@HOST."""
    user = str(os.getuid())
    with contextlib.suppress(OSError, KeyError):  # a container may run as a user without a name
        user = getpass.getuser()
    return os.environ.get("OLORA_SUBMITTER") or f"{user}@{socket.gethostname()}"


def lineage() -> dict[str, str]:
    """Return the tags that say which code runs here, and for whom; what is unknown is missing."""
    script = Path(sys.argv[0] or ".").absolute()
    folder = script if script.is_dir() else script.parent
    tags = {
        CODE: node_cache.project(),
        COMMIT: os.environ.get("OLORA_COMMIT") or commit(folder),
        IMAGE: os.environ.get("OLORA_IMAGE", ""),
        SUBMITTER: submitter(),
    }
    return {name: text for name, text in tags.items() if text}


def _context_tags() -> dict[str, str]:
    # With the tags that mlflow.start_run would add.
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": Path(sys.argv[0] or ".").absolute().name,
    } | lineage()
    with contextlib.suppress(OSError, KeyError):
        tags["mlflow.user"] = getpass.getuser()
    known = tags.get(COMMIT, "").removesuffix(CHANGED)
    if known:
        tags["mlflow.source.git.commit"] = known
    return tags


# The MLflow run around a piece of work: created or resumed before it, closed as FINISHED, FAILED or KILLED after it.


class RunIds(Protocol):
    """Remembers the MLflow run of the work, so that the next attempt resumes it."""

    def tracking_run(self, uri: str, storage_root: str) -> str | None: ...

    def keep_tracking_run(self, uri: str, storage_root: str, run_id: str) -> None: ...


@contextlib.contextmanager
def mlflow_run(
    config: Config,
    tags: Mapping[str, str],
    ids: RunIds,
    params: Mapping[str, object],
    *,
    parent: str | None = None,
    after_error: Status = "FAILED",
    advice: str = "",
) -> Iterator[Tracker]:
    """Keep the config's MLflow run open for the block, then close it.

    An interrupted run ends as KILLED, one that was TakenOver is left as it is, any other error ends it as
    `after_error`. `parent` is the id of the run below which it is shown. If MLflow is unreachable at the end, the run
    stays open until the next attempt, and TrackingUnavailable is raised, with `advice`. Raises TryAgain if the run was
    deleted meanwhile.
    """
    from mlflow.exceptions import MlflowException

    uri = resolve_uri(config)
    root = config.run.storage
    if parent:
        tags = {**tags, "mlflow.parentRunId": parent}
    tracker = start_run(config, config.run.name, tags, ids.tracking_run(uri, root))
    ids.keep_tracking_run(uri, root, tracker.run_id)
    tracker.params(params)
    try:
        try:
            yield tracker
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                after_error = "KILLED"
            if not isinstance(error, TakenOver):  # otherwise the run belongs to another driver now
                with contextlib.suppress(TrackingUnavailable):
                    tracker.end(after_error, seconds=5)
            raise
        tracker.end("FINISHED")
    except TrackingUnavailable as error:
        raise TrackingUnavailable(f"{error}; {advice}" if advice else str(error)) from None
    except MlflowException as error:
        if not _is_deleted(tracker):
            raise
        raise TryAgain(
            f"tracking: the MLflow run {tracker.run_id} was deleted during this run ({reason(error)});"
            " run the same command again to resume; it logs to a new MLflow run"
        ) from None


def _is_deleted(tracker: Tracker) -> bool:
    """True if the run is deleted, for good or in MLflow's trash, perhaps with its experiment."""
    with contextlib.suppress(TrackingUnavailable), reachable(tracker.uri):
        run = existing(tracker.client().get_run, tracker.run_id)
        return run is None or run.info.lifecycle_stage == "deleted"
    return False
