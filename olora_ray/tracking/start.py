"""Start of an MLflow run: its address, its experiment, and the run itself, made or resumed."""

import getpass
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.secrets import in_uri, looked_up
from olora_ray.config import paths
from olora_ray.config.evaluation import AnyConfig
from olora_ray.tracking import artifacts, moved_storage
from olora_ray.tracking.client import TrackingUnavailable, check, connect, reachable, reason, shown_uri
from olora_ray.tracking.run import TAG_LENGTH, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

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
    place = paths.absolute(uri.removeprefix("sqlite:///"), paths.lasting(here))
    if paths.lasting(here) != here:
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
    artifacts.check(place, uri)


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
    artifacts.use_paths()
    moved_storage.follow(config)
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
            return str(
                client.create_experiment(name, artifact_location=None if served else artifacts.default_place(config))
            )
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
