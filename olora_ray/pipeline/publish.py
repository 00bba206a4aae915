"""Publication of a finished run: metrics, reports and the model go to MLflow, and a version is registered."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import storage
from olora_ray.pipeline.answers import Sample, Scores, score
from olora_ray.pipeline.fingerprint import Fingerprint, settings_digest
from olora_ray.pipeline.mlflow_run import log_data
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tracking import client, models
from olora_ray.tracking.run import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What a run has left in MLflow."""

    result: dict[str, Any]
    """The content of result.json."""
    scores: Scores
    page: str | None
    """Address of the run's page, if a server shows it."""


def log_results(spec: TrainSpec, tracker: Tracker, result: TrainResult, answers: Sequence[Sample]) -> Scores:
    """Score the answers, and log scores, pictures and tables; safe to repeat.

    It comes before `publish`, so that a version is registered only when nothing is left that can fail. Raises
    UserError for a scorer that fails, and TrackingUnavailable if MLflow does not answer.
    """
    assert result.state is not None
    scores, history = score(spec.config, answers), result.state.history
    tracker.metrics({result.state.step: {f"score/{name}": value for name, value in scores.get("after", {}).items()}})
    tracker.metrics({0: {f"score/{name}": value for name, value in scores.get("before", {}).items()}})
    tracker.learning_curve(_points(history, "train/loss"), _points(history, "eval/loss"))
    columns = ("prompt", "reference", "before", "after")
    tracker.table("samples", columns, [[getattr(item, name) for name in columns] for item in answers])
    return scores


def publish(
    spec: TrainSpec,
    folder: RunFolder,
    tracker: Tracker,
    result: TrainResult,
    parity: dict[str, Any],
    more_tags: Mapping[str, str],
) -> int | None:
    """Log the metrics that MLflow lacks, the parity report and the merged model; register it, if it is to be.

    Returns the version. Safe to repeat; raises TrackingUnavailable if MLflow does not answer.
    """
    config, state = spec.config, result.state
    assert state is not None
    tracker.metrics({int(row["step"]): {k: v for k, v in row.items() if k != "step"} for row in state.history})
    log_data(tracker, spec)
    tracker.text(json.dumps(parity, indent=2), "parity.json")
    made_of = Fingerprint(
        spec.base.digest, spec.train.digest, spec.eval.digest if spec.eval else "", settings_digest(config)
    )
    tags = {
        **made_of.tags(),
        "olora.run_folder": folder.root,
        "olora.method": config.adapter.method,
        "olora.rank": config.adapter.rank,
        "olora.eval_loss": "" if state.best_loss is None else f"{state.best_loss:.6f}",
        **more_tags,
    }
    name, alias = config.registry.model, config.registry.alias
    with storage.fetched(folder.merged) as merged, client.reachable(tracker.uri, upload=True):
        if name is None:
            logger.info("logging the merged model")
            models.log_model(tracker, merged, tags, base_name=config.run.name)
            return None
        logger.info(f"registering the merged model as {name}@{alias}")
        return models.register(tracker, merged, name, alias, tags)


def finish(
    spec: TrainSpec, tracker: Tracker, result: TrainResult, scores: Scores, parity: dict[str, Any], version: int | None
) -> Published:
    """Log what the run has come to; safe to repeat.

    Raises TrackingUnavailable if MLflow does not answer: result.json must not be written before all is logged.
    """
    content = _result(spec, tracker, result, scores, parity, version)
    tracker.text(json.dumps(content, indent=2) + "\n", "result.json")
    return Published(content, scores, tracker.url())


def _result(
    spec: TrainSpec, tracker: Tracker, result: TrainResult, scores: Scores, parity: dict[str, Any], version: int | None
) -> dict[str, Any]:
    assert result.state is not None
    state = result.state
    last: dict[str, float] = {}
    for row in state.history:
        last |= {name: value for name, value in row.items() if name != "step"}
    if state.best_loss is not None:
        last["eval/loss"] = state.best_loss
    first = next((row["eval/loss"] for row in state.history if "eval/loss" in row), None)
    return {
        "run": spec.config.run.name,
        "steps": state.step,
        "stopped_early": result.stopped_early,
        "best_step": state.best_step if state.best_step is not None else state.step,
        "metrics": last,
        "eval_loss_before": first,
        "scores": scores,
        "base": asdict(spec.base),
        "data": {"train": spec.train.digest, "eval": spec.eval.digest if spec.eval else None},
        "self_test": result.self_test,
        "parity": parity,
        "mlflow": {"uri": client.shown_uri(tracker.uri), "run_id": tracker.run_id},
        "registered": {"model": spec.config.registry.model, "version": version, "alias": spec.config.registry.alias}
        if version is not None
        else None,
    }


def _points(history: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[name]) for row in history if name in row]
