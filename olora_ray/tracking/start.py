"""Start of an MLflow run: its address, its experiment, and the run itself, made or resumed."""

import contextlib
import getpass
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from olora_ray.common import patience, storage
from olora_ray.common.errors import TakenOver, TryAgain, UserError
from olora_ray.common.secrets import in_uri, looked_up
from olora_ray.config import command_line
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.tracking.client import (
    TrackingUnavailable,
    check,
    connect,
    is_unavailable,
    reachable,
    reason,
    remedy,
    shown_uri,
)
from olora_ray.tracking.run import TAG_LENGTH, Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# The database beside run.storage when the storage lies elsewhere than before: MLflow keeps paths of artifacts in it.


FOLDER = "mlartifacts"
"""The artifacts' folder in run.storage."""
DATABASE = "mlflow.db"
"""The database's name there."""
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow 3.17 keeps a path of an artifact; it has no call to change one."""


def follow(place: str) -> None:
    """Let the SQLite database in a storage name the artifacts in that storage, after it was moved or copied there.

    Artifacts that lie elsewhere on purpose, in a storage that has no database, keep their places. Call it before files
    are read: the model that the first run in the new place starts from may be registered.
    """
    file, now = Path(place) / DATABASE, os.path.join(os.path.abspath(place), FOLDER)
    if storage.is_uri(place) or not file.is_file():
        return
    moved: list[str] = []
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=30)) as database:
        try:
            with database:
                for (before,) in database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
                    if not before or before == now or not before.startswith("/") or os.path.basename(before) != FOLDER:
                        continue
                    if os.path.isdir(before) and not os.path.isfile(os.path.join(os.path.dirname(before), DATABASE)):
                        continue
                    moved.append(before)
                    for table, column in COLUMNS:
                        database.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608  # names of ours
                            f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                            (now, len(before) + 1, before, len(before) + 1, f"{before}/"),
                        )
        except sqlite3.DatabaseError as error:
            if moved:  # else none of MLflow yet, or none at all, which MLflow itself says better
                logger.warning(f"run.storage has moved, but MLflow's artifacts keep their places, {moved[0]}: {error}")
            return
    for before in moved:
        logger.info(f"run.storage has moved: MLflow's artifacts are in {now}, no longer in {before}")


# MLflow's artifact store: a test, before a training, that it takes files.


PROBE = ".probe"
PROBE_BYTES = 4 * 2**20
"""More than a proxy takes by default: 1 MB, for nginx."""
PROBE_SECONDS = 30.0
FIELD = "MLflow's artifact store"


def default_place(config: AnyConfig) -> str:
    """Return where the files of a new experiment lie if MLflow is a database: beside the storage."""
    place = config.run.storage
    return storage.join(place if storage.is_uri(place) else os.path.abspath(place), FOLDER)


def probe(place: str, uri: str) -> None:
    """Write and delete a file of PROBE_BYTES at `place`, an experiment's artifact location in the MLflow at `uri`.

    Raises UserError that says what to mend, or TrackingUnavailable if the store does not answer, within PROBE_SECONDS.
    """
    use_paths()
    if place.startswith("s3://") and not os.environ.get("MLFLOW_S3_ENDPOINT_URL"):
        storage.check(place, FIELD)
    failed: list[Exception] = []

    def work() -> None:
        try:
            _write(place, uri)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="artifacts", daemon=True)  # a call that hangs does not hold up the end
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        failed.append(TimeoutError(f"no answer within {PROBE_SECONDS:g} s"))
    for error in failed:
        if isinstance(error, UserError):
            raise error
        if isinstance(error, ModuleNotFoundError):
            raise UserError(f"{FIELD}: {place} needs the Python package {error.name}: pip install {error.name}")
        text = remedy(error)
        kind = TrackingUnavailable if text is None and is_unavailable(error) else UserError
        why = f"{text} ({reason(error)})" if text else reason(error)
        raise kind(f"{FIELD}: {place} at {shown_uri(uri)} cannot be written: {why}")


def use_paths() -> None:
    """Let MLflow address buckets as the rest of this project does: by path, where the S3 store is not AWS."""
    if patience.s3_endpoint():
        os.environ.setdefault("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "path")


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


VARIABLE = "MLFLOW_TRACKING_URI"
"""Where MLflow itself looks for its address."""


def resolve_uri(config: AnyConfig) -> str:
    """The address of MLflow: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the storage.

    A relative SQLite path is made absolute (see `absolute`). The address may hold a
    password: show it with `shown_uri` only. Raises UserError when nothing is set and the storage is a URI,
    beside which no database can lie, or when what env:NAME or file:/PATH means is not there.
    """
    named = looked_up(config.tracking.uri, "tracking.uri") if config.tracking.uri else None
    if uri := named or os.environ.get(VARIABLE):
        return absolute(uri)
    if storage.is_uri(config.run.storage):
        raise UserError(
            f"tracking.uri: not set, and no database can lie beside run.storage={config.run.storage}; set it to an"
            " MLflow server, http://HOST:PORT, or to sqlite:////PATH/mlflow.db"
        )
    return f"sqlite:///{os.path.abspath(config.run.storage)}/mlflow.db"


def everywhere(config: AnyConfig) -> str:
    """The `tracking.uri` that means this MLflow to other processes too, whatever their folder and variables are.

    Of an address with a secret in it the place is named, which every node then must have. Raises UserError as
    `resolve_uri`.
    """
    uri = resolve_uri(config)
    return (config.tracking.uri or f"env:{VARIABLE}") if in_uri(uri) else uri


def absolute(uri: str) -> str:
    """An address with a relative SQLite path as one with an absolute path, because workers run in another folder.

    In a job it lies where a relative run.storage does: the job's own folder is deleted after it, with all runs and
    registered models in it.
    """
    if not uri.startswith("sqlite:///") or uri.startswith(("sqlite:////", "sqlite:///:memory:")):
        return uri
    here = Path.cwd()
    place = command_line.absolute(uri.removeprefix("sqlite:///"), command_line.lasting(here))
    if command_line.lasting(here) != here:
        os.makedirs(os.path.dirname(place), exist_ok=True)
    return f"sqlite:///{place}"


def check_artifacts(config: AnyConfig, uri: str) -> None:
    """Raise UserError within seconds if files of the config's experiment cannot be written, or models not be logged.

    Makes the experiment at `uri` if it is not there. Raises TrackingUnavailable if MLflow or the store does not answer.
    """
    with reachable(uri):
        client = connect(uri)
        experiment = _experiment(client, config, uri)
        _refuse_older(client, experiment, uri)
        place = str(client.get_experiment(experiment).artifact_location)
    probe(place, uri)


def _refuse_older(client: "MlflowClient", experiment: str, uri: str) -> None:
    """A server of MLflow 2 takes runs, but not the model at their end."""
    from mlflow.exceptions import MlflowException

    try:
        client.search_logged_models([experiment], max_results=1)
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        raise UserError(
            f"tracking.uri={shown_uri(uri)}: this server has no logged models, as those before MLflow 3;"
            " install a newer one, or name another in tracking.uri"
        ) from None


def start_run(config: AnyConfig, run_name: str, tags: Mapping[str, str], run_id: str | None = None) -> "Tracker":
    """Make the run, in an experiment that is made if needed, or continue with `run_id` if it is still there.

    Call it in one process, the driver: several processes that meet a new database at once collide.
    Raises UserError if the experiment has been deleted or the address is wrong. If the server does not
    answer now, a new run raises TrackingUnavailable; one with a `run_id` is resumed as soon as it answers.
    """
    uri = resolve_uri(config)
    use_paths()
    follow(config.run.storage)
    try:
        check(uri)
        with reachable(uri):
            return _start(connect(uri), uri, config, run_name, {**_context_tags(), **tags}, run_id)
    except TrackingUnavailable:
        if run_id is None:
            raise
    tracker = Tracker(uri, run_id)
    tracker.reopen()
    return tracker


def _start(
    client: "MlflowClient", uri: str, config: AnyConfig, run_name: str, tags: Mapping[str, object], run_id: str | None
) -> Tracker:
    experiment = _experiment(client, config, uri)
    if run_id is not None and _reopen(client, run_id):
        return Tracker(uri, run_id)
    texts = {name: str(value)[:TAG_LENGTH] for name, value in tags.items()}
    return Tracker(uri, client.create_run(experiment, tags=texts, run_name=run_name).info.run_id, fresh=True)


def _experiment(client: "MlflowClient", config: AnyConfig, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        # A server knows where artifacts go; without one MLflow would take the current folder.
        served = uri.startswith(("http://", "https://", "databricks"))
        try:
            return str(client.create_experiment(name, artifact_location=None if served else default_place(config)))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # made by another driver in the meantime?
            if found is None:
                raise UserError(f"tracking.experiment={name}: {reason(error)}") from None
    if found.lifecycle_stage == "deleted":
        raise UserError(f"tracking.experiment: {name!r} was deleted in MLflow; restore it there or choose another name")
    return str(found.experiment_id)


def _reopen(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage == "active":
            client.update_run(run_id, status="RUNNING")
            return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    logger.warning("MLflow run %s is gone: the rest of this run is tracked in a new one", run_id)
    return False


def _context_tags() -> dict[str, str]:
    # What mlflow.start_run would add; the commit without GitPython, which warns where git is missing.
    script = Path(sys.argv[0] or ".").absolute()
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": script.name}
    try:
        tags["mlflow.user"] = getpass.getuser()
        folder = script if script.is_dir() else script.parent
        git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        tags["mlflow.source.git.commit"] = subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, KeyError, subprocess.CalledProcessError):
        pass  # no user name, no git, or no checkout (a submitted job)
    return tags


# The MLflow run around a piece of work: made or resumed before it, closed as FINISHED, FAILED or KILLED after it.


class RunIds(Protocol):
    """Remembers which MLflow run belongs to the work, so that the next attempt resumes it."""

    def tracking_run(self, uri: str) -> str | None:
        """The id of the run in the MLflow at `uri`; None if there is none yet."""

    def keep_tracking_run(self, uri: str, run_id: str) -> None:
        """Remember the id."""


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
    """The MLflow run named as the config's run, for the block; a KeyboardInterrupt or Stopped leaves it KILLED,
    TakenOver as it is.

    `parent` is the id of the run that it is shown below. If MLflow is unreachable at the end the run stays open
    until the next attempt, and TrackingUnavailable is raised, with `advice`; TryAgain if somebody has deleted the run.
    """
    from mlflow.exceptions import MlflowException

    uri = resolve_uri(config)
    tags = {**tags, **({"mlflow.parentRunId": parent} if parent else {})}
    tracker = start_run(config, config.run.name, tags, ids.tracking_run(uri))
    ids.keep_tracking_run(uri, tracker.run_id)
    tracker.params(params)
    try:
        try:
            yield tracker
        except TakenOver:
            raise  # the run is another driver's now
        except BaseException as error:
            with contextlib.suppress(TrackingUnavailable):
                tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else after_error, seconds=5)
            raise
        tracker.end("FINISHED")
    except TrackingUnavailable as error:
        raise TrackingUnavailable(f"{error}; {advice}" if advice else str(error)) from None
    except MlflowException as error:
        if not _is_deleted(tracker):
            raise
        raise TryAgain(
            f"tracking: the MLflow run {tracker.run_id} was deleted while it was written to ({reason(error)});"
            " run the same command again: it goes on with what is done, in a new MLflow run"
        ) from None


def _is_deleted(tracker: Tracker) -> bool:
    """Whether the run is there no more, or only in MLflow's trash, and its experiment perhaps with it."""
    from mlflow.exceptions import MlflowException

    try:
        with reachable(tracker.uri):
            return bool(tracker.client().get_run(tracker.run_id).info.lifecycle_stage == "deleted")
    except TrackingUnavailable:
        return False
    except MlflowException as error:
        return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")
