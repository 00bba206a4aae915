"""The MLflow run of a training: made or resumed, and closed."""

import contextlib
from collections.abc import Iterator

from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.dotted import flatten
from olora_ray.config.schema import Config
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tracking import client, run
from olora_ray.tracking.mlflow_run import mlflow_run
from olora_ray.tracking.mlmodel import check_adapter_only
from olora_ray.tracking.start import check_artifacts, resolve_uri

LATER = "nothing is lost: run the same command again when it does, to finish logging and registering"


def check_tracking(config: Config, folder: RunFolder) -> None:
    """Raise UserError if MLflow does not answer, its files cannot be written, or it cannot load what is exported.

    A run that is there already may continue without it for a while.
    """
    uri = resolve_uri(config)
    if not config.export.merged:
        check_adapter_only()
    if folder.tracking_run(uri) is None:
        client.check(uri)
        check_artifacts(config, uri)


@contextlib.contextmanager
def tracked(spec: TrainSpec, folder: RunFolder, parent: str | None = None) -> Iterator[run.Tracker]:
    """The MLflow run of this run, made or resumed; closed as FINISHED, FAILED or KILLED.

    `parent` is the id of the run of a search that this one is a trial of.
    """
    config = spec.config
    tags = {"olora.base_digest": spec.base.digest, "olora.method": config.adapter.method}
    with mlflow_run(config, tags, folder, flatten(config), parent=parent, advice=LATER) as tracker:
        log_data(tracker, spec)
        if not parent:
            tracker.watch_system()
        yield tracker


def log_data(tracker: run.Tracker, spec: TrainSpec) -> None:
    """Log the token stores that are complete as inputs of the run."""
    sources = {"training": (spec.train, spec.config.data.train), "evaluation": (spec.eval, spec.config.data.eval)}
    for context, (store, named) in sources.items():
        if store is not None and store.complete:  # else it is logged when training has ended
            place = ", ".join(source.path for source in named) or "held out from training"
            tracker.dataset(context, store.digest, place, store.manifest.rows, context)
