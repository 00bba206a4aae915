"""Saves results: in evaluation.json, answers line by line in answers.jsonl, and in an MLflow run per model."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from olora_ray.common import storage
from olora_ray.config import paths
from olora_ray.config.dotted import flatten
from olora_ray.evaluation.bootstrap import Interval
from olora_ray.evaluation.command_line import Request
from olora_ray.evaluation.results import Evaluation
from olora_ray.evaluation.targets import Target, run_of
from olora_ray.tracking import client
from olora_ray.tracking.start import resolve_uri, start_run

logger = logging.getLogger(__name__)

FILE = "evaluation.json"
ANSWERS = "answers.jsonl"
"""One line for each answer that was scored."""


def check(request: Request) -> None:
    """Raise UserError if results could not be written where they go: nothing is measured for a file that cannot be."""
    if folder := _folder(request):
        storage.check(folder, "argument --out")


def address(request: Request, targets: Sequence[Target]) -> str | None:
    """The MLflow that results go to; None if none is configured: no config, no run, no MLFLOW_TRACKING_URI.

    Raises UserError or TrackingUnavailable if it does not answer.
    """
    configured = request.config or any(run_of(name) for name in request.models)
    if not (configured or "tracking.uri" in request.changes or os.environ.get("MLFLOW_TRACKING_URI")):
        return None
    uri = resolve_uri(targets[0].config)
    client.check(uri)
    return uri


def write(
    request: Request,
    results: Sequence[Evaluation],
    intervals: Mapping[str, Interval],
    uri: str | None,
) -> None:
    """Keep the results in --out or the first model's run folder, and in the MLflow at `uri`.

    Raises TrackingUnavailable if MLflow does not answer; the file is written by then.
    """
    text = _text(request, results, intervals)
    if folder := _folder(request):
        lines = "".join(_answers(results))
        for name, content in ((FILE, text), (ANSWERS, lines)) if lines else ((FILE, text),):
            storage.write_text(storage.join(folder, name), content)
            logger.info(f"written: {storage.join(folder, name)}")
        if not lines and storage.exists(left := storage.join(folder, ANSWERS)):
            logger.warning(f"{left}: is of an earlier evaluation; this one has scored no answers")
    if uri is None:
        return
    for result in results:
        _track(result, text)
    logger.info(f"logged: {len(results)} run(s) with the tag olora.kind=evaluation in {client.shown_uri(uri)}")


def _folder(request: Request) -> str | None:
    """Where the files of an evaluation go; None: nowhere."""
    # In a job not below its own folder, which is deleted after it.
    return paths.absolute(request.out, paths.lasting(Path.cwd())) if request.out else run_of(request.models[0])


def _answers(results: Sequence[Evaluation]) -> Iterator[str]:
    for result in results:
        for item in result.answers:
            tree = {"model": result.target.name, **asdict(item)}
            yield json.dumps(tree) + "\n"


def _text(request: Request, results: Sequence[Evaluation], intervals: Mapping[str, Interval]) -> str:
    tree = {
        "models": [result.to_json() for result in results],
        "limit": request.limit,
        "differences": {name: asdict(found) for name, found in intervals.items()},
    }
    return json.dumps(tree, indent=2) + "\n"


def _track(result: Evaluation, text: str) -> None:
    target = result.target
    tags = {"olora.kind": "evaluation", "olora.model": target.name, "olora.base_digest": target.base.digest}
    short = "-".join(part for part in target.name.replace("://", "/").rstrip("/").split("/")[-2:] if part)
    tracker = start_run(target.config, f"evaluation of {short}", tags)
    tracker.params(
        {name: value for name, value in flatten(target.config).items() if name.startswith(("model.", "evaluation."))}
    )
    tracker.metrics({0: {**result.metrics(), **{f"{name}_stderr": error for name, error in result.errors().items()}}})
    tracker.text(text, FILE)
    tracker.end("FINISHED")
