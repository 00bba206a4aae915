"""Publication of a finished run: metrics, reports and the model go to MLflow, and a version is registered."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.config.schema import Config
from olora_ray.pipeline import contents
from olora_ray.pipeline.answers import Sample, Scores, score
from olora_ray.pipeline.fingerprint import Fingerprint, settings_digest
from olora_ray.pipeline.mlflow_run import log_data
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tracking import client, models
from olora_ray.tracking.record import RUN
from olora_ray.tracking.run import Tracker
from olora_ray.train.state import TrainState, perplexity

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
    scores: Scores | None = None,
) -> int | None:
    """Log the metrics that MLflow lacks, the parity report and the model; register it, if it is to be.

    Returns the version. Safe to repeat; raises TrackingUnavailable if MLflow does not answer.
    """
    config, state = spec.config, result.state
    assert state is not None
    tracker.metrics({int(row["step"]): {k: v for k, v in row.items() if k != "step"} for row in state.history})
    log_data(tracker, spec)
    tracker.text(json.dumps(parity, indent=2), "parity.json")
    name, alias, what = config.registry.model, config.registry.alias, _what(config)
    with contents.of_run(spec, folder, result, scores or {}) as found, client.reachable(tracker.uri, upload=True):
        tags = {**_tags(spec, folder, state), **more_tags}
        if name is None:
            logger.info(f"logging the {what}")
            models.log_model(tracker, found, tags)
            return None
        logger.info(f"registering the {what} as {name}@{alias}")
        return models.register(tracker, found, name, alias, tags)


def _what(config: Config) -> str:
    return "merged model" if config.export.merged else "adapter, without its base model,"


def _tags(spec: TrainSpec, folder: RunFolder, state: TrainState) -> dict[str, object]:
    """The tags of a version: a few for people, and those of its record."""
    config = spec.config
    held_out = spec.eval.digest if spec.eval else ""
    made_of = Fingerprint(spec.base.digest, spec.train.digest, held_out, settings_digest(config))
    return {
        **made_of.tags(),
        RUN: folder.root,
        "olora.method": config.adapter.method,
        "olora.rank": config.adapter.rank,
        "olora.eval_loss": "" if state.best_loss is None else f"{state.best_loss:.6f}",
    }


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
    if state.best_loss is not None:  # that of the adapter that is exported
        last |= {"eval/loss": state.best_loss, "eval/perplexity": perplexity(state.best_loss)}
    first = next((row["eval/loss"] for row in state.history if "eval/loss" in row), None)
    return {
        "run": spec.config.run.name,
        "steps": state.step,
        "stopped_early": result.stopped_early,
        "best_step": state.best_step if state.best_step is not None else state.step,
        "metrics": last,
        "eval_loss_before": first,
        "scores": scores,
        "base": spec.base.to_json(),
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
