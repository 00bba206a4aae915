"""The MLflow run around a piece of work: made or resumed before it, closed as FINISHED, FAILED or KILLED after it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from olora_ray.common.errors import TakenOver, TryAgain
from olora_ray.config.schema import Config
from olora_ray.tracking.client import TrackingUnavailable, reachable, reason
from olora_ray.tracking.run import Status, Tracker
from olora_ray.tracking.start import resolve_uri, start_run


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
        with _ended(tracker, after_error):
            yield tracker
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


@contextlib.contextmanager
def _ended(tracker: Tracker, after_error: Status) -> Iterator[None]:
    try:
        yield
    except TakenOver:
        raise  # the run is another driver's now
    except BaseException as error:
        with contextlib.suppress(TrackingUnavailable):
            tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else after_error, seconds=5)
        raise
    tracker.end("FINISHED")
