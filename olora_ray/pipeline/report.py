"""The output of a finished run for people."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from shlex import quote
from typing import Any

from olora_ray.common import page, storage
from olora_ray.common.secrets import mask
from olora_ray.common.text import duration, plural
from olora_ray.config.schema import Config
from olora_ray.pipeline.answers import Sample
from olora_ray.pipeline.export import Exported
from olora_ray.pipeline.exporter import exporter_named
from olora_ray.pipeline.run_folder import RunState
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import models
from olora_ray.tracking.aliases import CHALLENGER
from olora_ray.tracking.run import Tracker

logger = logging.getLogger(__name__)

# report.html in the run's folder, and the description of its MLflow run.


PAGE = "report.html"


def write_page(
    exported: Exported, answers: Sequence[Sample], result: Mapping[str, Any], tracker: Tracker
) -> None:
    """Write the page of the run, and the description of its MLflow run; `result` is the content of result.json."""
    facts, name = dict(_facts(exported, result)), exported.spec.config.run.name
    heads = [(column, "text", "") for column in ("prompt", "wanted", "before", "after")]
    # The table `samples` in MLflow has all.
    rows = [(each.prompt, each.reference, each.before, each.after) for each in answers[:20]]
    commands = "\n".join(next_steps(result, tracker.url()))
    body = (
        f'<h1>{escape(name)}</h1>\n<div class="card">{page.terms(facts.items())}</div>\n'
        f'<h2>Loss</h2>\n<div class="figures">{page.image(_curve(exported), "Loss of each step", wide=True)}</div>\n'
        + (f"<h2>Answers to held-out prompts</h2>\n{page.table(heads, rows)}\n" if rows else "")
        + f'<h2>Next</h2>\n<div class="card"><pre>{escape(commands)}</pre></div>'
    )
    storage.write_text(
        storage.join(exported.folder.root, PAGE), page.document(f"{name}: run", body)
    )
    tracker.tags(
        {"mlflow.note.content": "\n".join(f"- **{fact}**: {said}" for fact, said in facts.items())}
    )


def _facts(exported: Exported, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    spec, state, config, adapter = (
        exported.spec,
        exported.state,
        exported.spec.config,
        exported.spec.config.adapter,
    )
    if losses := exported.losses():
        yield (
            "held-out loss",
            f"{losses[0]:.4f} before, {state.best_loss:.4f} after step {state.best_step}",
        )
    for name, value in result["scores"].get("after", {}).items():
        before = result["scores"]["before"].get(name)
        yield (
            f"held-out {name}",
            f"{value:.3f}" if before is None else f"{before:.3f} before, {value:.3f} after",
        )
    trained = (
        f", {exported.result.trainable:,} parameters trained" if exported.result.trainable else ""
    )
    yield (
        "model",
        f"{mask(spec.base.shown())}; {adapter.method} rank {adapter.rank}, alpha {adapter.alpha:g}{trained}",
    )
    yield "training rows", _rows(spec.train)
    if spec.eval:
        yield "held-out rows", _rows(spec.eval)
    early = ", stopped early" if exported.result.stopped_early else ""
    yield (
        "training",
        f"{plural(state.step, 'step')}, peak rate {state.lr or config.train.lr}{early}",
    )
    used = sorted(exported.folder.used().items())
    yield "used", ", ".join(f"{duration(seconds)} of {kind}s" for kind, seconds in used)
    checked = "the exported adapter, loaded with PEFT, computes what was trained"
    quantised = exported.parity.get("quantised")
    yield "export", f"{checked}; {quantised['in_words']}" if quantised else checked


def _rows(store: TokenStore) -> str:
    if not store.complete:
        return "still being prepared when the last step was done"
    manifest = store.manifest
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
    return (
        f"{manifest.rows:,} with {manifest.tokens:,} tokens, {manifest.supervised:,} of them supervised, in"
        f" {manifest.packs:,} sequences of up to {manifest.max_length:,}; rejected: {rejected or 'none'}"
    )


def _curve(exported: Exported) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        axes = (figure := Figure(figsize=(12.0, 4.8), layout="constrained")).add_subplot()
        for name, shown in (
            ("train/loss", "training, each step on its own rows"),
            ("eval/loss", "held out"),
        ):
            if points := [
                (row["step"], row[name]) for row in exported.state.history if name in row
            ]:
                axes.plot(
                    *zip(*points, strict=True), marker="o" if len(points) < 20 else "", label=shown
                )
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.grid(axis="y", color="#e4e7eb")
        axes.legend(frameon=False)
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=150)
    return buffer.getvalue()


# The lines that a run prints at its end.


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


def finished(
    exported: Exported, answers: Sequence[Sample], result: Mapping[str, Any], url: str | None
) -> None:
    """Print answers, losses and scores before and after training, and commands that use the model.

    `result` is the content of result.json, `url` the address of the run's page on an MLflow server.
    """
    for line in [*_summary(exported, answers, result["scores"]), *next_steps(result, url)]:
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
        lines.append(
            f"held-out loss: {evaluated[0]:.4f} before, {state.best_loss:.4f} after (step {state.best_step})"
        )
        if not config.data.eval:
            lines.append(
                "the held-out rows are from the training files and may be worded alike: ask in new words, too"
            )
    for name, value in scores.get("after", {}).items():
        before = f"{scores['before'][name]:.3f} before, " if name in scores["before"] else ""
        lines.append(f"held-out {name}: {before}{value:.3f} after ({len(answers)} rows)")
    if quantised := exported.parity.get("quantised"):
        lines.append(f"adapter: {quantised['in_words']}")
    lines.append(f"report:               {storage.join(folder.root, PAGE)}")
    lines.append(f"adapter (PEFT, vLLM): {folder.adapter}")
    if config.export.merged:
        lines.append(f"merged model:         {folder.merged}")
    for name in config.export.also:
        lines.append(f"{exporter_named(name).label + ':':21} {folder.export(name)}")
    return lines


def next_steps(result: Mapping[str, Any], url: str | None) -> list[str]:
    """Return commands that use a finished run; they work in any folder."""
    store, run_id = result["mlflow"]["uri"], result["mlflow"]["run_id"]
    lines = []
    if (registered := result["registered"]) is not None:
        uri = f"models:/{registered['model']}@{registered['alias']}"
        lines.append(
            f"registered:           {registered['model']} version {registered['version']} ({uri})"
        )
        if registered["alias"] != CHALLENGER:  # the gate has not decided about a challenger
            lines += models.uses(store, uri)
    ui = f"{models.scripts()}/mlflow ui --backend-store-uri {quote(store)}"
    return [*lines, f"MLflow: {url}" if url else f"MLflow: {ui}  # run {run_id}"]


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 300 else flat[:297] + "..."
