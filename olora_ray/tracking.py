"""What a run leaves in MLflow: one MLflow run a fine-tuning, whatever was restarted meanwhile.

The driver makes the run (`start`); whatever else writes to it does so through a `Tracker`, which is only a
URI and a run id and so travels by pickle. No global MLflow state is used: no active run, no set_tracking_uri.
"""

import getpass
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from olora_ray import storage
from olora_ray.config import Config
from olora_ray.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_log = logging.getLogger(__name__)

# MLflow's own limits (mlflow/utils/validation.py): a longer request is refused.
_METRICS_A_BATCH, _PARAMS_A_BATCH, _PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH = 1000, 100, 6000, 8000, 36
# Rows that wait for an unreachable server; the oldest are dropped beyond it.
_WAITING = 100_000
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

Status = Literal["FINISHED", "FAILED", "KILLED"]
Points = Sequence[tuple[int, float]]


def resolve_uri(config: Config) -> str:
    """Where runs are tracked: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the storage.

    A relative SQLite path is made absolute, because workers run in another folder. Raises UserError
    when nothing is set and the storage is a URI, beside which no database can lie.
    """
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        relative = uri.startswith("sqlite:///") and not uri.startswith(("sqlite:////", "sqlite:///:memory:"))
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///")) if relative else uri
    if storage.is_uri(config.run.storage):
        raise UserError(
            f"tracking.uri: not set, and no database can lie beside run.storage={config.run.storage}; set it to an"
            " MLflow server, http://HOST:PORT, or to sqlite:////PATH/mlflow.db"
        )
    return f"sqlite:///{os.path.abspath(config.run.storage)}/mlflow.db"


def check(uri: str) -> None:
    """Raise UserError within seconds if no MLflow server or database answers at `uri`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        _probe(uri)
        with _patience(retries=1, seconds=5):
            connect(uri).search_experiments(max_results=1)
    except ModuleNotFoundError as error:
        raise UserError(f"tracking.uri={shown_uri(uri)}: needs the Python package {error.name}") from None
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"tracking.uri={shown_uri(uri)}: {_reason(uri, error)}") from None


def start(config: Config, run_name: str, tags: Mapping[str, str], run_id: str | None = None) -> "Tracker":
    """Make the run, in an experiment that is made if needed, or go on with `run_id` if it is still there.

    Call it in one process, the driver: several processes that meet a new database at once collide.
    Raises UserError if the server does not answer or the experiment has been deleted.
    """
    uri = resolve_uri(config)
    check(uri)
    client = connect(uri)
    experiment = _experiment(client, config, uri)
    if run_id is not None and _reopen(client, run_id):
        return Tracker(uri, run_id)
    every = {**_context_tags(), **tags}
    run = client.create_run(experiment, tags={k: str(v)[:_TAG_LENGTH] for k, v in every.items()}, run_name=run_name)
    return Tracker(uri, run.info.run_id)


@cache
def connect(uri: str) -> "MlflowClient":
    """MLflow's client for a server or database, kept quiet: it tells of set-up at INFO and prints links."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow.store", "mlflow.system_metrics", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


class Tracker:
    """One MLflow run, by address and id. Pickling keeps these two and nothing else."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._waiting: list[Metric] = []
        self._monitor: Any = None

    def __reduce__(self) -> tuple[type["Tracker"], tuple[str, str]]:
        return type(self), (self.uri, self.run_id)

    def client(self) -> "MlflowClient":
        """MLflow's client for this run's server."""
        return connect(self.uri)

    def metrics(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Log step -> {name: value}.

        A server that does not answer must not stop the training: the rows wait for the next call,
        with a warning.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [Metric(name, float(value), now, step) for step, row in rows.items() for name, value in row.items()]
        self._waiting = (self._waiting + new)[-_WAITING:]
        try:
            with _patience(retries=1, seconds=10):
                self._send()
        except Exception as error:
            _log.warning("MLflow does not take metrics, %d values wait: %s", len(self._waiting), _line(error))

    def _send(self) -> None:
        while self._waiting:
            self.client().log_batch(self.run_id, metrics=self._waiting[:_METRICS_A_BATCH])
            del self._waiting[:_METRICS_A_BATCH]

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters, cut to MLflow's length; one that has another value already (a resumed run) becomes a tag."""
        from mlflow.entities import Param

        there = self.client().get_run(self.run_id).data.params
        texts = {name: str(value)[:_PARAM_LENGTH] for name, value in values.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in there]
        for begin in range(0, len(new), _PARAMS_A_BATCH):
            self.client().log_batch(self.run_id, params=new[begin : begin + _PARAMS_A_BATCH])
        self.tags({f"resumed.{name}": text for name, text in texts.items() if there.get(name, text) != text})

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags of the run."""
        for name, value in values.items():
            self.client().set_tag(self.run_id, name, str(value)[:_TAG_LENGTH])

    def dataset(self, name: str, digest: str, source: str, rows: int, context: str = "training") -> None:
        """Record a dataset as an input; `context` is training or evaluation, the digest is cut to 36 characters."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = "local" if not storage.is_uri(source) else source.partition("://")[0]
        profile = json.dumps({"num_rows": rows})
        data = Dataset(name, digest[:_DIGEST_LENGTH], kind, json.dumps({"uri": source}), profile=profile)
        self.client().log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def figure(self, figure: "Figure", name: str) -> None:
        """Log a matplotlib figure as the artifact `name`, e.g. curve.png."""
        self.client().log_figure(self.run_id, figure, name, save_kwargs={"dpi": 150})

    def learning_curve(self, train: Points, evaluation: Points, name: str = "learning_curve.png") -> None:
        """Log a figure of the losses; both are (step, loss) in order of steps."""
        self.figure(_learning_curve(train, evaluation), name)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a table as the artifact `name`.json, which MLflow shows as one; a table of that name is replaced."""
        file = f"{name}.json"
        if file in {item.path for item in self.client().list_artifacts(self.run_id)}:
            # log_table would append to it.
            self.client().log_dict(self.run_id, {"columns": list(columns), "data": [list(row) for row in rows]}, file)
            return
        data = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
        self.client().log_table(self.run_id, data, file)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or everything in a folder, under the artifact folder `folder`."""
        if path.is_dir():
            self.client().log_artifacts(self.run_id, str(path), folder)
        else:
            self.client().log_artifact(self.run_id, str(path), folder)

    def text(self, content: str, name: str) -> None:
        """Log text as the artifact `name`."""
        self.client().log_text(self.run_id, content, name)

    def watch_system(self, seconds: float = 10.0) -> None:
        """Log this machine's CPU, memory, disk, network and GPUs as system/... until `end`."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self._monitor is None:
            make: Any = SystemMetricsMonitor
            self._monitor = make(self.run_id, seconds, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()

    def url(self) -> str | None:
        """The run's page, if a server shows it."""
        if not self.uri.startswith("http"):
            return None
        experiment = self.client().get_run(self.run_id).info.experiment_id
        return f"{self.uri.rstrip('/')}/#/experiments/{experiment}/runs/{self.run_id}"

    def end(self, status: Status = "FINISHED") -> None:
        """Send what waits and close the run."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self.metrics({})
        self.client().set_terminated(self.run_id, status)


@contextmanager
def _patience(retries: int, seconds: int) -> Iterator[None]:
    """MLflow asks an HTTP server for minutes by default (7 retries of up to 120 s); its settings are variables."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _probe(uri: str) -> None:
    # SQLAlchemy under MLflow tries a database that is not there for minutes.
    parts = urlsplit(uri)
    port = _DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    if port and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), timeout=5).close()


def _experiment(client: "MlflowClient", config: Config, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        # A server knows where artifacts go; without one MLflow would take the current folder.
        served = uri.startswith(("http://", "https://", "databricks"))
        try:
            return str(client.create_experiment(name, artifact_location=None if served else _artifacts(config)))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # made by another driver in the meantime?
            if found is None:
                raise UserError(f"tracking.experiment={name}: {_line(error)}") from None
    if found.lifecycle_stage == "deleted":
        raise UserError(f"tracking.experiment: {name!r} was deleted in MLflow; restore it there or choose another name")
    return str(found.experiment_id)


def _artifacts(config: Config) -> str:
    place = config.run.storage
    return storage.join(place if storage.is_uri(place) else os.path.abspath(place), "mlartifacts")


def _reopen(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage == "active":
            client.update_run(run_id, status="RUNNING")
            return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    _log.warning("MLflow run %s is gone: the rest of this run is tracked in a new one", run_id)
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


def _learning_curve(train: Points, evaluation: Points) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # With few points a line alone shows nothing.
    axes.plot(*_columns(train), color="#9bb7d4", linewidth=1.2, label="train", marker="." if len(train) < 3 else None)
    axes.plot(*_columns(evaluation), color="#c44e52", linewidth=1.8, label="eval", marker="o", markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.legend(frameon=False)
    return figure


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _reason(uri: str, error: Exception) -> str:
    text = str(error)
    if "maintenance mode" in text:
        return "MLflow keeps runs in a database or on a server; use sqlite:////PATH/mlflow.db or http://HOST:PORT"
    if "unsupported URI" in text:
        return "not an address MLflow knows; use http://HOST:PORT, sqlite:////PATH/mlflow.db or another database"
    if uri.startswith("http") and ("error code 401" in text or "error code 403" in text):
        return "the server refuses access; set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if uri.startswith("http") and ("error code" in text or "response body" in text):
        return f"something answers, but not an MLflow server with this path: {_line(error)}"
    if uri.startswith("http"):
        return f"no MLflow server answers: {_line(error)}"
    return f"the database cannot be used: {_line(error)}"


def _line(error: Exception) -> str:
    """The first line of an error, and of urllib3's onion only the core."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    cause = text.rpartition("(Caused by ")[2]
    return re.sub(r"^\w+\(.*?\): |^\w+\(.*?, '|['\"]?\)+$", "", cause)[:300] if cause != text else text[:300]


def shown_uri(uri: str) -> str:
    """The URI without a password."""
    parts: Any = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri
