"""What a run leaves in MLflow: one MLflow run a fine-tuning, whatever was restarted meanwhile.

The driver makes the run (`start`); whatever else writes to it does so through a `Tracker`, which is only a
URI and a run id and so travels by pickle. No global MLflow state is used: no active run, no set_tracking_uri.

MLflow may be away for a while. Metrics, parameters, tags and datasets then wait (see outbox.py) and training
goes on; what is read or uploaded at the end of a run raises TrackingAway, and can be called again.
"""

import getpass
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.secrets import looked_up
from olora_ray.config.schema import Config

# The address belongs to tracking for whoever uses it.
from olora_ray.tracking.client import TrackingAway as TrackingAway
from olora_ray.tracking.client import away, reason
from olora_ray.tracking.client import check as check
from olora_ray.tracking.client import connect as connect
from olora_ray.tracking.client import reachable as reachable
from olora_ray.tracking.client import shown_uri as shown_uri
from olora_ray.tracking.write_queue import Outbox

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

# MLflow's own limits (mlflow/utils/validation.py): a longer request is refused.
_PARAMS_A_BATCH, _PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH = 100, 6000, 8000, 36

Status = Literal["FINISHED", "FAILED", "KILLED"]
Points = Sequence[tuple[int, float]]


def resolve_uri(config: Config) -> str:
    """Where runs are tracked: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the storage.

    A relative SQLite path is made absolute, because workers run in another folder. The address may hold a
    password: show it with `shown_uri` only. Raises UserError when nothing is set and the storage is a URI,
    beside which no database can lie, or when what env:NAME or file:/PATH means is not there.
    """
    named = looked_up(config.tracking.uri, "tracking.uri") if config.tracking.uri else None
    if uri := named or os.environ.get("MLFLOW_TRACKING_URI"):
        relative = uri.startswith("sqlite:///") and not uri.startswith(("sqlite:////", "sqlite:///:memory:"))
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///")) if relative else uri
    if storage.is_uri(config.run.storage):
        raise UserError(
            f"tracking.uri: not set, and no database can lie beside run.storage={config.run.storage}; set it to an"
            " MLflow server, http://HOST:PORT, or to sqlite:////PATH/mlflow.db"
        )
    return f"sqlite:///{os.path.abspath(config.run.storage)}/mlflow.db"


def start(config: Config, run_name: str, tags: Mapping[str, str], run_id: str | None = None) -> "Tracker":
    """Make the run, in an experiment that is made if needed, or go on with `run_id` if it is still there.

    Call it in one process, the driver: several processes that meet a new database at once collide.
    Raises UserError if the experiment has been deleted or the address is wrong. If the server does not
    answer now, a new run raises TrackingAway; one with a `run_id` is taken up as soon as it answers.
    """
    uri = resolve_uri(config)
    try:
        check(uri)
        with reachable(uri):
            return _start(connect(uri), uri, config, run_name, {**_context_tags(), **tags}, run_id)
    except TrackingAway:
        if run_id is None:
            raise
    tracker = Tracker(uri, run_id)
    tracker.reopen()
    return tracker


class Tracker:
    """One MLflow run, by address and id. Pickling keeps these two and nothing else.

    `metrics`, `params`, `tags`, `dataset` and `watch_system` return at once: a thread writes in their order.
    All others raise TrackingAway if MLflow does not answer.
    """

    def __init__(self, uri: str, run_id: str, *, fresh: bool = False) -> None:
        """`fresh` promises that the run has no metrics yet; else MLflow is asked before any is written."""
        self.uri = uri
        self.run_id = run_id
        self._outbox = Outbox(uri, run_id, fresh=fresh)
        self._stop_watching = threading.Event()
        self._watch: threading.Thread | None = None

    def __reduce__(self) -> tuple[type["Tracker"], tuple[str, str]]:
        return type(self), (self.uri, self.run_id)

    @property
    def pending(self) -> int:
        """How many metric values wait to be written."""
        return self._outbox.pending

    def client(self) -> "MlflowClient":
        """MLflow's client for this run's server; call it inside `reachable(tracker.uri)`."""
        return connect(self.uri)

    def metrics(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Log step -> {name: value}, in the order of the calls; never waits, never raises.

        A (name, step) that MLflow has, or that was given before, is ignored. After `end` all are.
        """
        self._outbox.rows(rows)

    def last_step(self, name: str) -> int | None:
        """The highest step that MLflow has of a metric; None if it has none, or does not answer."""
        try:
            with reachable(self.uri):
                return max((item.step for item in self.client().get_metric_history(self.run_id, name)), default=None)
        except TrackingAway:
            return None

    def reopen(self) -> None:
        """Let the run be RUNNING again."""
        self._outbox.write("to reopen the run", lambda client: client.update_run(self.run_id, status="RUNNING"))

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters, cut to MLflow's length; one that has another value already (a resumed run) becomes a tag."""
        texts = {name: str(value)[:_PARAM_LENGTH] for name, value in values.items()}
        self._outbox.write("parameters", lambda client: _write_params(client, self.run_id, texts))

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags of the run."""
        texts = {name: str(value) for name, value in values.items()}
        self._outbox.write("tags", lambda client: _write_tags(client, self.run_id, texts))

    def dataset(self, name: str, digest: str, source: str, rows: int, context: str = "training") -> None:
        """Record a dataset as an input; `context` is training or evaluation, the digest is cut to 36 characters."""
        kind = "local" if not storage.is_uri(source) else source.partition("://")[0]
        profile = json.dumps({"num_rows": rows})

        def write(client: "MlflowClient") -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            data = Dataset(name, digest[:_DIGEST_LENGTH], kind, json.dumps({"uri": source}), profile=profile)
            client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

        self._outbox.write(f"the dataset {name}", write)

    def figure(self, figure: "Figure", name: str) -> None:
        """Log a matplotlib figure as the artifact `name`, e.g. curve.png."""
        with reachable(self.uri):
            self.client().log_figure(self.run_id, figure, name, save_kwargs={"dpi": 150})

    def learning_curve(self, train: Points, evaluation: Points, name: str = "learning_curve.png") -> None:
        """Log a figure of the losses; both are (step, loss) in order of steps."""
        self.figure(_learning_curve(train, evaluation), name)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a table as the artifact `name`.json, which MLflow shows as one; a table of that name is replaced."""
        file = f"{name}.json"
        with reachable(self.uri):
            if file in {item.path for item in self.client().list_artifacts(self.run_id)}:
                # log_table would append to it.
                content = {"columns": list(columns), "data": [list(row) for row in rows]}
                self.client().log_dict(self.run_id, content, file)
                return
            data = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
            self.client().log_table(self.run_id, data, file)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or everything in a folder, under the artifact folder `folder`."""
        with reachable(self.uri, upload=True):
            log = self.client().log_artifacts if path.is_dir() else self.client().log_artifact
            log(self.run_id, str(path), folder)

    def text(self, content: str, name: str) -> None:
        """Log text as the artifact `name`."""
        with reachable(self.uri):
            self.client().log_text(self.run_id, content, name)

    def watch_system(self, seconds: float = 10.0) -> None:
        """Log this machine's CPU, memory, disk, network and GPUs as system/... until `end`, while MLflow answers."""
        if self._watch is None:
            self._outbox.start()
            self._watch = threading.Thread(
                target=_watch_system,
                args=(self.uri, self.run_id, seconds, self._outbox, self._stop_watching),
                name="system metrics",
                daemon=True,
            )
            self._watch.start()

    def url(self) -> str | None:
        """The run's page, if a server shows it."""
        if not self.uri.startswith("http"):
            return None
        with reachable(self.uri):
            experiment = self.client().get_run(self.run_id).info.experiment_id
        return f"{shown_uri(self.uri).rstrip('/')}/#/experiments/{experiment}/runs/{self.run_id}"

    def flush(self, seconds: float) -> bool:
        """Wait until all that waits is written, at most so long; False if some is left."""
        return self._outbox.flush(seconds)

    def end(self, status: Status = "FINISHED", seconds: float = 30.0) -> None:
        """Write what waits, close the run and end its threads.

        Raises TrackingAway if MLflow does not answer for `seconds`; what waited is lost then.
        """
        self._stop_watching.set()
        if self._watch is not None:
            self._watch.join()
        now = int(time.time() * 1000)
        self._outbox.write("the end of the run", lambda client: client.set_terminated(self.run_id, status, now))
        written = self._outbox.flush(seconds)
        self._outbox.close()
        if not written:
            raise away(self.uri, self._outbox.away or f"{self.pending} metric values wait after {seconds:g} s")


def _start(
    client: "MlflowClient", uri: str, config: Config, run_name: str, tags: Mapping[str, object], run_id: str | None
) -> Tracker:
    experiment = _experiment(client, config, uri)
    if run_id is not None and _reopen(client, run_id):
        return Tracker(uri, run_id)
    texts = {name: str(value)[:_TAG_LENGTH] for name, value in tags.items()}
    return Tracker(uri, client.create_run(experiment, tags=texts, run_name=run_name).info.run_id, fresh=True)


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
                raise UserError(f"tracking.experiment={name}: {reason(error)}") from None
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


def _write_params(client: "MlflowClient", run_id: str, texts: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    there = client.get_run(run_id).data.params
    new = [Param(name, text) for name, text in texts.items() if name not in there]
    for begin in range(0, len(new), _PARAMS_A_BATCH):
        client.log_batch(run_id, params=new[begin : begin + _PARAMS_A_BATCH])
    changed = {f"resumed.{name}": text for name, text in texts.items() if there.get(name, text) != text}
    _write_tags(client, run_id, changed)


def _write_tags(client: "MlflowClient", run_id: str, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        client.set_tag(run_id, name, text[:_TAG_LENGTH])


def _watch_system(uri: str, run_id: str, seconds: float, outbox: Outbox, stop: threading.Event) -> None:
    """MLflow's samplers without its loop, which ends for good at the first request that fails."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    make: Any = SystemMetricsMonitor
    monitor: Any = None
    while not stop.wait(seconds):
        if not outbox.online:
            continue  # making the monitor would wait for a locked database
        try:
            monitor = monitor or make(run_id, seconds, tracking_uri=uri)
            monitor.collect_metrics()
            outbox.system(monitor.aggregate_metrics())
            for sampler in monitor.monitors:
                sampler.clear_metrics()
        except Exception as error:
            _log.warning("no more metrics of this machine: %s", reason(error))
            return


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
