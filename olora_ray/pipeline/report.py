"""The output of a finished run for people."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from shlex import quote
from typing import Any

from olora_ray.common.secrets import mask
from olora_ray.common.text import duration, plural, shortened
from olora_ray.config.schema import Config
from olora_ray.pipeline.answers import Sample
from olora_ray.pipeline.export import Exported
from olora_ray.pipeline.exporter import exporter_named
from olora_ray.pipeline.progress import of_pairs
from olora_ray.pipeline.run_folder import RunState
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import models
from olora_ray.tracking.aliases import CHALLENGER

logger = logging.getLogger(__name__)
FORGETS = 0.03
"""A larger rise of the loss on other texts is named: the default of gate.guard_margin."""


def _held_out(exported: Exported, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    losses = exported.losses()
    pairs = of_pairs(exported.best_row, "eval")
    if pairs:
        yield "held-out pairs", pairs
    if losses:
        step = exported.state.best_step
        text = f"{losses[0]:.4f} before, {exported.best_loss:.4f} after step {step}"
        if pairs:
            text += ", of right answers"
        yield "held-out loss", text
    if exported.guard:
        yield "loss on other texts", _forgotten(*exported.guard)
    scores = result["scores"]
    for name, value in scores.get("after", {}).items():
        text = f"{value:.3f}"
        if name in scores["before"]:
            text = f"{scores['before'][name]:.3f} before, {text} after"
        yield f"held-out {name}", text


def _forgotten(before: float, after: float) -> str:
    text = f"{before:.4f} before, {after:.4f} after"
    if after - before > FORGETS:
        text += (
            "; the model has forgotten some of what it knew: a lower train.lr keeps more, and train.weight_decay pulls"
            " it back to its start"
        )
    return text


def facts(exported: Exported, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the page and MLflow's description say of the run; `result` is the content of result.json."""
    spec = exported.spec
    state = exported.state
    adapter = spec.config.adapter
    yield from _held_out(exported, result)
    text = (
        f"{mask(spec.base.shown())}; {adapter.method} rank {adapter.rank}, alpha {adapter.alpha:g}"
    )
    if exported.result.trainable:
        text += f", {exported.result.trainable:,} parameters trained"
    yield "model", text
    yield "training rows", _rows(spec.train)
    if spec.eval:
        yield "held-out rows", _rows(spec.eval)
    text = f"{plural(state.step, 'step')}, peak rate {state.lr or spec.config.train.lr}"
    if exported.result.stopped_early:
        text += ", stopped early"
    yield "training", text
    used = sorted(exported.folder.used().items())
    yield "used", ", ".join(f"{duration(seconds)} of {kind}s" for kind, seconds in used)
    text = "the exported adapter, loaded with PEFT, computes what was trained"
    quantised = exported.parity.get("quantised")
    if quantised:
        text += f"; {quantised['in_words']}"
    yield "export", text


def _rows(store: TokenStore) -> str:
    if not store.complete:
        return "still being prepared when the last step was done"
    manifest = store.manifest
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
    return (
        f"{manifest.rows:,} with {manifest.tokens:,} tokens, {manifest.supervised:,} of them supervised, in"
        f" {manifest.packs:,} sequences of up to {manifest.max_length:,}; rejected: {rejected or 'none'}"
    )


# The lines that a run prints at its end.


def already_finished(config: Config, state: RunState, result: dict[str, Any]) -> None:
    """Log the result of a finished run, and the settings of export and registry that the config has changed since."""
    loss = result.get("metrics", {}).get("eval/loss")
    shown = f", eval loss {loss:.4f}" if loss is not None else ""
    logger.info(
        f"run {config.run.name!r} is already finished{shown}: see {state.root}; to train longer,"
        " raise train.steps or train.epochs; to train again, set another run.name or delete that folder"
    )
    changes = state.delivered_otherwise(config)
    if changes:
        logger.warning(
            f"the run was exported and registered with other settings ({changes}), which change nothing now; for other"
            f" files: olora-ray export {state.root} --to FOLDER (--help shows the forms); to register it again without"
            f" training, delete {state.root}/result.json and run the same command"
        )


def finished(
    exported: Exported,
    answers: Sequence[Sample],
    result: Mapping[str, Any],
    url: str | None,
    verdict: str,
) -> None:
    """Print answers, losses and scores before and after training, commands that use the model, and the verdict.

    `result` is the content of result.json, `url` the address of the run's page on an MLflow server.
    """
    for line in _summary(exported, answers, result):
        if line:
            logger.info(line)
        else:
            print()
    for line in next_steps(result, url):
        logger.info(line, extra={"copied": True})
    if exported.state.best_step == 0 < exported.state.step:
        measured = "objective" if "eval/objective" in exported.best_row else "loss"
        logger.warning(
            f"no step has improved the held-out {measured}, so the export is the untrained model; lower train.lr, or"
            " check that the held-out rows resemble the training rows"
        )
    logger.info(verdict)


def _summary(exported: Exported, answers: Sequence[Sample], result: Mapping[str, Any]) -> list[str]:
    folder = exported.folder
    config = exported.spec.config
    lines = [""]
    for item in answers[: config.evaluation.samples]:
        texts = {
            "prompt:  ": item.prompt,
            "  wanted:": item.reference,
            "  before:": item.before,
            "  after: ": item.after,
        }
        lines += [f"{label} {_one_line(text)}" for label, text in texts.items()]
        lines.append("")
    lines += [f"{name}: {text}" for name, text in _held_out(exported, result)]
    if exported.losses() and not config.data.eval:
        lines.append(
            "the held-out rows are from the training files and may be worded alike: ask in new words, too"
        )
    quantised = exported.parity.get("quantised")
    if quantised:
        lines.append(f"adapter: {quantised['in_words']}")
    lines.append(f"report:               {folder.page}")
    lines.append(f"adapter (PEFT, vLLM): {folder.adapter}")
    if config.export.merged:
        lines.append(f"merged model:         {folder.merged}")
    for name in config.export.also:
        lines.append(f"{exporter_named(name).label + ':':21} {folder.export(name)}")
    return lines


def next_steps(result: Mapping[str, Any], url: str | None) -> list[str]:
    """Return commands that use a finished run; they work in any folder."""
    store = result["mlflow"]["uri"]
    registered = result["registered"]
    lines = []
    if registered is not None:
        uri = f"models:/{registered['model']}@{registered['alias']}"
        lines.append(
            f"registered:           {registered['model']} version {registered['version']} ({uri})"
        )
        if registered["alias"] != CHALLENGER:  # the gate has not decided about a challenger
            lines += models.uses(store, uri)
    if not url:
        ui = f"{models.scripts()}/mlflow ui --backend-store-uri {quote(store)}"
        url = f"{ui}  # run {result['mlflow']['run_id']}"
    return [*lines, f"MLflow: {url}"]


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), 300)
