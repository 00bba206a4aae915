"""Writer of one MLflow run: one run per fine-tuning, however often it restarts.

The driver creates the run (start.py). Everything else writes to it through a `Tracker`, which is only a URI and a run
id and so can be pickled. No global MLflow state is used: no active run, no set_tracking_uri.

MLflow may be unreachable for a while. Then metrics, parameters, tags and datasets wait (write_queue.py) and training
continues. Reads and uploads at the end of a run raise TrackingUnavailable and can be repeated.
"""

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olora_ray.common import storage
from olora_ray.tracking.client import (
    TrackingUnavailable,
    connect,
    existing,
    reachable,
    reason,
    shown_uri,
    unavailable,
)
from olora_ray.tracking.write_queue import WriteQueue

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

# MLflow's own limits (mlflow/utils/validation.py): a longer request is refused.
_PARAMS_PER_BATCH = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
_DIGEST_LENGTH = 36

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """One MLflow run, by address and id. Only these two are pickled.

    `metrics`, `params`, `tags`, `dataset` and `watch_system` return immediately: a thread writes in their order. All
    other methods raise TrackingUnavailable if MLflow does not answer.
    """

    def __init__(self, uri: str, run_id: str, *, fresh: bool = False) -> None:
        self.uri = uri
        self.run_id = run_id
        # `fresh` promises that the run has no metrics yet. Otherwise MLflow is asked before any metric is written.
        self._queue = WriteQueue(uri, run_id, fresh=fresh)
        self._stop_watching = threading.Event()
        self._watch: threading.Thread | None = None

    def __reduce__(self) -> tuple[type["Tracker"], tuple[str, str]]:
        return type(self), (self.uri, self.run_id)

    @property
    def pending(self) -> int:
        return self._queue.pending

    def client(self) -> "MlflowClient":
        """Return MLflow's client for this run's server; call it inside `tracker.reachable()`."""
        return connect(self.uri)

    def reachable(self, upload: bool = False) -> contextlib.AbstractContextManager[None]:
        return reachable(self.uri, upload=upload)

    def metrics(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Log step -> {name: value}, in the order of the calls; never wait, never raise.

        A pair (name, step) that was given before or that MLflow has is ignored. After `end` all pairs are ignored.
        """
        self._queue.rows(rows)

    def last_step(self, name: str) -> int | None:
        """Return the highest step of a metric in MLflow; None if there is none, or MLflow does not answer."""
        try:
            with self.reachable():
                history = self.client().get_metric_history(self.run_id, name)
                return max((item.step for item in history), default=None)
        except TrackingUnavailable:
            return None

    def reopen(self) -> None:
        self._queue.write(
            "to reopen the run", lambda client: client.update_run(self.run_id, status="RUNNING")
        )

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters, cut to MLflow's length; in a resumed run a changed parameter becomes a tag."""
        texts = {name: str(value)[:PARAM_LENGTH] for name, value in values.items()}

        def write(client: "MlflowClient") -> None:
            from mlflow.entities import Param

            known = client.get_run(self.run_id).data.params
            new = [Param(name, text) for name, text in texts.items() if name not in known]
            for begin in range(0, len(new), _PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=new[begin : begin + _PARAMS_PER_BATCH])
            for name, text in texts.items():
                if known.get(name, text) != text:
                    client.set_tag(self.run_id, f"resumed.{name}", text[:TAG_LENGTH])

        self._queue.write("parameters", write)

    def tags(self, values: Mapping[str, object]) -> None:
        texts = {name: str(value)[:TAG_LENGTH] for name, value in values.items()}

        def write(client: "MlflowClient") -> None:
            for name, text in texts.items():
                client.set_tag(self.run_id, name, text)

        self._queue.write("tags", write)

    def dataset(
        self, name: str, digest: str, source: str, rows: int, context: str = "training"
    ) -> None:
        """Record a dataset as an input; `context` is training or evaluation, the digest is cut to 36 characters."""
        source_type = "local"
        if storage.is_uri(source):
            source_type = source.partition("://")[0]
        profile = json.dumps({"num_rows": rows})

        def write(client: "MlflowClient") -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            where = json.dumps({"uri": source})
            data = Dataset(name, digest[:_DIGEST_LENGTH], source_type, where, profile=profile)
            tags = [InputTag("mlflow.data.context", context)]
            client.log_inputs(self.run_id, [DatasetInput(data, tags)])

        self._queue.write(f"the dataset {name}", write)

    def of_model(
        self, model_id: str, step: int, names: Sequence[str], dataset: tuple[str, str] | None = None
    ) -> None:
        """Link the run's metrics at `step` with a logged model and the dataset (name, digest) they were measured on.

        Safe to repeat. Names that the run does not have at this step are ignored.
        """
        from mlflow.entities import Metric

        if not self.flush(30.0):
            raise self._unwritten(30.0)
        measured_on = (dataset[0], dataset[1][:_DIGEST_LENGTH]) if dataset else (None, None)
        linked = []
        with self.reachable():
            for name in names:
                for each in self.client().get_metric_history(self.run_id, name):
                    # MLflow stores the NaN of a logged model as 0.
                    if each.step != step or math.isnan(each.value):
                        continue
                    # With the run's own timestamps, MLflow recognises the points that the run has, so that its series
                    # gets no step twice.
                    point = (each.key, each.value, each.timestamp, each.step)
                    linked.append(Metric(*point, model_id, *measured_on))
            self.client().log_batch(self.run_id, metrics=linked)

    def evaluates(self, model_id: str) -> bool:
        """Record a logged model as an input of this run; return False if this MLflow does not have it."""
        from mlflow.entities import LoggedModelInput

        with self.reachable():
            if existing(self.client().get_logged_model, model_id) is None:
                return False
            self.client().log_inputs(self.run_id, models=[LoggedModelInput(model_id)])
        return True

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Log a table as the artifact `name`.json; replace a table of that name."""
        file = f"{name}.json"
        with self.reachable():
            if file in {item.path for item in self.client().list_artifacts(self.run_id)}:
                # log_table would append to the existing table.
                content = {"columns": list(columns), "data": [list(row) for row in rows]}
                self.client().log_dict(self.run_id, content, file)
                return
            data = {}
            for number, column in enumerate(columns):
                data[column] = [row[number] for row in rows]
            self.client().log_table(self.run_id, data, file)

    def artifact(self, path: Path) -> None:
        with self.reachable(upload=True):
            log = self.client().log_artifacts if path.is_dir() else self.client().log_artifact
            log(self.run_id, str(path))

    def text(self, content: str, name: str) -> None:
        with self.reachable():
            self.client().log_text(self.run_id, content, name)

    def watch_system(self, seconds: float = 10.0) -> None:
        """Log this machine's CPU, memory, disk, network and GPUs as system/... until `end`."""
        if self._watch is None:
            self._watch = threading.Thread(
                target=self._watched, args=[seconds], name="system metrics", daemon=True
            )
            self._watch.start()

    def _watched(self, seconds: float) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        make: Any = SystemMetricsMonitor
        while not self._stop_watching.is_set():
            try:
                with contextlib.suppress(TrackingUnavailable), self.reachable():
                    monitor = make(self.run_id, seconds, resume_logging=True, tracking_uri=self.uri)
                    monitor._shutdown_event = self._stop_watching
                    monitor.monitor()  # ends for good when one request fails, so it begins again
            except Exception as error:
                logger.warning(f"system metrics are not logged: {reason(error)}")
                return
            self._stop_watching.wait(seconds)

    def url(self) -> str | None:
        """Return the address of the run's page; None if no server shows it."""
        if not self.uri.startswith("http"):
            return None
        with self.reachable():
            experiment = self.client().get_run(self.run_id).info.experiment_id
        return f"{shown_uri(self.uri).rstrip('/')}/#/experiments/{experiment}/runs/{self.run_id}"

    def flush(self, seconds: float) -> bool:
        """Wait at most `seconds` until everything is written; return False if something still waits."""
        return self._queue.flush(seconds)

    def end(self, status: Status = "FINISHED", seconds: float = 30.0) -> None:
        """Write everything that waits, close the run and end its threads.

        Raises TrackingUnavailable if MLflow does not answer for `seconds`; then everything that waits is lost.
        """
        self._stop_watching.set()
        if self._watch is not None:
            self._watch.join(1.0)  # it may wait for MLflow
        now = int(time.time() * 1000)
        self._queue.write(
            "the end of the run", lambda client: client.set_terminated(self.run_id, status, now)
        )
        written = self._queue.flush(seconds)
        self._queue.close()
        if not written:
            raise self._unwritten(seconds)

    def _unwritten(self, seconds: float) -> TrackingUnavailable:
        why = self._queue.away or f"{self.pending} metric values wait after {seconds:g} s"
        return unavailable(self.uri, why)


def took(uri: str, run_id: str | None) -> float | None:
    """Return the seconds from the start to the end of a run; None if it has not ended, or was deleted."""
    if run_id is None:
        return None
    with reachable(uri):
        run = existing(connect(uri).get_run, run_id)
    if run is None or run.info.end_time is None:
        return None
    return float(run.info.end_time - run.info.start_time) / 1000


def newest_runs(uri: str, words: str, most: int, experiment: str | None = None) -> Sequence["Run"]:
    """Return up to `most` runs that MLflow's filter `words` finds, the newest first; of all experiments by default."""
    with reachable(uri):
        client = connect(uri)
        if experiment is None:
            places = [each.experiment_id for each in client.search_experiments()]
        else:
            known = client.get_experiment_by_name(experiment)
            if known is None:
                return []
            places = [known.experiment_id]
        newest = ["attributes.start_time DESC"]
        return client.search_runs(places, words, max_results=most, order_by=newest)
