"""The output of a finished run for people; this module does not write to MLflow."""

import logging
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from olora_ray.config.schema import Config
from olora_ray.pipeline.answers import Sample
from olora_ray.pipeline.export import Exported
from olora_ray.pipeline.run_folder import RunState
from olora_ray.tracking import models
from olora_ray.tracking.aliases import CHALLENGER

logger = logging.getLogger(__name__)


def already_finished(config: Config, state: RunState, result: dict[str, Any]) -> None:
    """Log the result of a finished run, and the settings of export and registry that the config has changed since."""
    loss = result.get("metrics", {}).get("eval/loss")
    shown = f", eval loss {loss:.4f}" if loss is not None else ""
    logger.info(
        f"run {config.run.name!r} is already finished{shown}: see {state.root}; to train longer,"
        " raise train.steps or train.epochs; to train again, set another run.name or delete that folder"
    )
    if changes := state.delivered_otherwise(config):
        logger.warning(
            f"the run was exported and registered with other settings ({changes}); to export and register it again"
            f" without training, delete {state.root}/result.json and run the same command; MLflow keeps its earlier"
            " version"
        )


def finished(exported: Exported, answers: Sequence[Sample], result: Mapping[str, Any], page: str | None) -> None:
    """Print answers, losses and scores before and after training, and commands that use the model.

    `result` is the content of result.json, `page` the address of the run's page on an MLflow server.
    """
    for line in [*_summary(exported, answers, result["scores"]), *next_steps(result, page)]:
        if line:
            logger.info(line)
        else:
            print()
    if exported.state.best_step == 0 < exported.state.step:
        logger.warning(
            "no step has improved the held-out loss, so the export is the untrained model; lower train.lr, or check"
            " that the held-out rows resemble the training rows"
        )


def _summary(exported: Exported, answers: Sequence[Sample], scores: Mapping[str, Any]) -> list[str]:
    state, folder, config = exported.state, exported.folder, exported.spec.config
    lines = [""]
    for item in answers[: config.evaluation.samples]:
        lines += [f"prompt:   {_one_line(item.prompt)}"]
        lines += [f"  wanted: {_one_line(item.reference)}"]
        lines += [f"  before: {_one_line(item.before)}", f"  after:  {_one_line(item.after)}", ""]
    if evaluated := exported.losses():
        lines.append(f"held-out loss: {evaluated[0]:.4f} before, {state.best_loss:.4f} after (step {state.best_step})")
    for name, value in scores.get("after", {}).items():
        before = f"{scores['before'][name]:.3f} before, " if name in scores["before"] else ""
        lines.append(f"held-out {name}: {before}{value:.3f} after ({len(answers)} rows)")
    if quantised := exported.parity.get("quantised"):
        lines.append(f"adapter: {quantised['in_words']}")
    lines.append(f"adapter (PEFT, vLLM): {folder.adapter}")
    if config.export.merged:
        lines.append(f"merged model:         {folder.merged}")
    if config.export.gguf:
        lines.append(f"GGUF (llama.cpp):     {folder.gguf}")
    return lines


def next_steps(result: Mapping[str, Any], page: str | None) -> list[str]:
    """Return commands that use a finished run; they work in any folder."""
    store, run_id = result["mlflow"]["uri"], result["mlflow"]["run_id"]
    lines = []
    if (registered := result["registered"]) is not None:
        uri = f"models:/{registered['model']}@{registered['alias']}"
        lines.append(f"registered:           {registered['model']} version {registered['version']} ({uri})")
        if registered["alias"] != CHALLENGER:  # the gate has not decided about a challenger
            lines += models.uses(store, uri)
    ui = f"{models.scripts()}/mlflow ui --backend-store-uri {quote(store)}"
    return [*lines, f"MLflow: {page}" if page else f"MLflow: {ui}  # run {run_id}"]


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 300 else flat[:297] + "..."
