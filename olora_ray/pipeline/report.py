"""Output for people: the plan of a run, and what came out; nothing here writes to MLflow."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from olora_ray.adapter import export_preflight
from olora_ray.adapter.candidates import GATE, HEAD, ROUTER
from olora_ray.adapter.inject import Coverage, Selection
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model import source
from olora_ray.pipeline.answers import Sample
from olora_ray.pipeline.progress import batch_split
from olora_ray.pipeline.publish import Published
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train import scoring
from olora_ray.train.estimate import MemoryEstimate, estimate
from olora_ray.train.loader import total_steps

logger = logging.getLogger(__name__)

FULL_COVERAGE = 0.9
"""Share of the parameters from which on it needs no saying what the rest is."""


def plan(config: Config, base: source.BaseModel) -> MemoryEstimate:
    """Say and return the size of the run; raises UserError for targets, rank or scorer that cannot be."""
    check_scorer(config)
    if config.train.early_stop and not config.data.holds_out():
        logger.warning(
            "train.early_stop: the training will not stop early, because no rows are held out; set data.eval or"
            " data.eval_fraction"
        )
    size = deliverable(config, base)
    say(config, size)
    return size


def check_scorer(config: Config) -> None:
    """Raise UserError for a scorer that there is not; warn of one that will have nothing to do."""
    if not config.evaluation.scorer:
        return
    scoring.resolve(config.evaluation.scorer)
    if not config.data.holds_out():
        logger.warning(
            "evaluation.scorer: no answer will be scored, because no rows are held out; set data.eval or"
            " data.eval_fraction"
        )


def deliverable(config: Config, base: source.BaseModel) -> MemoryEstimate:
    """The size of a training; raises UserError for what cannot be trained, or be exported afterwards."""
    size = estimate(config, base)
    if found := export_preflight.problems(base, config, size.targets):
        raise UserError("; ".join(found))
    return size


def say(config: Config, size: MemoryEstimate, where: str = "") -> None:
    """The lines of a plan: what is adapted, what is left out, memory. `where` comes before each."""
    for line in (_model_line(config, size), *_left_out(size.selection), _memory_line(config, size)):
        logger.info(f"{where}{line}")


def steps(spec: TrainSpec) -> None:
    """The arithmetic of the training."""
    if spec.train.complete:
        manifest = spec.train.manifest
        logger.info(
            f"training: {length(spec.config, len(spec.train))}; an epoch has {len(spec.train):,} sequences,"
            f" {manifest.tokens:,} tokens, {manifest.supervised:,} of them supervised"
        )
    else:
        train = spec.config.train
        steps = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
        split = batch_split(spec.config, spec.config.cluster.max_workers())
        logger.info(f"training: {steps}; {split}; tokens come in {spec.train.shard_count:,} shards")


def already_finished(folder: RunFolder, result: dict[str, Any]) -> None:
    """Say that there is nothing to do, what came out, and what of it is not what the config asks for by now."""
    loss = result.get("metrics", {}).get("eval/loss")
    shown = f", eval loss {loss:.4f}" if loss is not None else ""
    logger.info(
        f"run {folder.config.run.name!r} is finished already{shown}: see {folder.config.folder()};"
        " to train again, set another run.name or delete that folder"
    )
    if changes := folder.delivered_otherwise(result):
        logger.warning(
            f"it was exported and registered with other settings ({changes}); to have that done anew, without training,"
            f" delete {folder.result} and give the command again: what MLflow has already stays as it is"
        )


def finished(
    config: Config, folder: RunFolder, result: TrainResult, answers: Sequence[Sample], published: Published
) -> None:
    """Show what came out: answers before and after, losses, scores, and how to use the model."""
    for line in _summary(config, folder, result, answers, published):
        if line:
            logger.info(line)
        else:
            print()
    if result.state is not None and result.state.best_step == 0 < result.state.step:
        logger.warning(
            "no step has made the held-out loss better: what is exported is the model that training started with,"
            " unchanged; lower train.lr, or look whether the held-out rows are like those that are trained on"
        )


def _summary(
    config: Config, folder: RunFolder, result: TrainResult, answers: Sequence[Sample], published: Published
) -> list[str]:
    state, scores = result.state, published.scores
    assert state is not None
    lines = [""]
    for item in answers[: config.evaluation.samples]:
        lines += [f"prompt:   {_one_line(item.prompt)}"]
        lines += [f"  wanted: {_one_line(item.reference)}"]
        lines += [f"  before: {_one_line(item.before)}", f"  after:  {_one_line(item.after)}", ""]
    evaluated = [row["eval/loss"] for row in state.history if "eval/loss" in row]
    if evaluated:
        lines.append(f"held-out loss: {evaluated[0]:.4f} before, {state.best_loss:.4f} after (step {state.best_step})")
    for name, value in scores.get("after", {}).items():
        before = f"{scores['before'][name]:.3f} before, " if name in scores["before"] else ""
        lines.append(f"held-out {name}: {before}{value:.3f} after ({len(answers)} rows)")
    if quantised := (published.result.get("parity") or {}).get("quantised"):
        lines.append(f"adapter: {quantised['in_words']}")
    lines.append(f"adapter (PEFT, vLLM): {folder.adapter}")
    if folder.config.export.merged:
        lines.append(f"merged model:         {folder.merged}")
    return lines + next_steps(published.result, published.page)


def next_steps(result: Mapping[str, Any], page: str | None) -> list[str]:
    """What can be done with a finished run, as commands that work as they are printed, in the folder of now.

    `page` is the address of the run's page, if a server shows it.
    """
    store, run_id = result["mlflow"]["uri"], result["mlflow"]["run_id"]
    scripts, lines = _scripts_folder(), []
    if (registered := result["registered"]) is not None:
        uri = f"models:/{registered['model']}@{registered['alias']}"
        lines += [
            f"registered:           {registered['model']} version {registered['version']} ({uri})",
            f"load:   mlflow.set_tracking_uri({json.dumps(store)}); mlflow.transformers.load_model({json.dumps(uri)})",
            # MLflow starts its server by a name that it looks up in PATH.
            f"serve:  PATH={quote(str(scripts))}:$PATH MLFLOW_TRACKING_URI={quote(store)} mlflow models serve"
            f" -m {quote(uri)} --env-manager local -p 5001",
        ]
    ui = f"{quote(str(scripts / 'mlflow'))} ui --backend-store-uri {quote(store)}"
    return [*lines, f"MLflow: {page}" if page else f"MLflow: {ui}  # run {run_id}"]


def _scripts_folder() -> Path:
    """Where this environment's commands are, seen from the current folder, whether or not it is activated."""
    folder, here = Path(sys.executable).parent, Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _model_line(config: Config, size: MemoryEstimate) -> str:
    share = size.trainable / size.parameters
    stacks = [target.experts for target in size.selection.targets.values() if target.experts is not None]
    experts = f" and {len(stacks)} stacks of {max(stacks)} experts" if stacks else ""
    most = "up to " if config.adapter.largest_rank() > config.adapter.rank else ""
    return (
        f"model: {size.parameters / 1e6:,.1f} M parameters; {config.adapter.method} rank {config.adapter.rank} on"
        f" {len(size.targets) - len(stacks)} layers{experts}: {most}{size.trainable / 1e6:,.2f} M trainable"
        f" ({share:.2%}); covers {_coverage(size.coverage)}"
    )


def _coverage(found: Coverage) -> str:
    """The share of the parameters behind an adapter; with the largest of the rest if that is more than a tenth."""
    total = found.adapted + sum(found.others.values())
    large = [kind for kind, count in found.others.items() if count > total / 100]
    rest = f" (left out: {', '.join(large)})" if found.share < FULL_COVERAGE and large else ""
    return f"{found.share:.0%} of the parameters{rest}"


def _left_out(selection: Selection) -> list[str]:
    """A line for each kind of layer that "all-linear" cannot take, and for parts that are no language model."""
    kinds: dict[str, list[str]] = {}
    for name, reason in selection.left_out.items():
        if reason not in (HEAD, ROUTER, GATE):
            kinds.setdefault(reason.kind, []).append(name)
    return [
        f"adapter.targets: all-linear leaves out {len(names)} layers: {kind} (for example {names[0]})"
        for kind, names in kinds.items()
    ]


def length(config: Config, packs: int, about: bool = False) -> str:
    """The steps of a run, and what one is made of; `about`: the number of packs is an estimate."""
    steps = f"{'about ' if about else ''}{total_steps(config.train, packs)} steps"
    return f"{steps}; {batch_split(config, config.cluster.max_workers())}"


def _memory_line(config: Config, size: MemoryEstimate) -> str:
    packed = config.model.quantization
    parts = (
        (size.base_bytes, "base" if packed == "none" else f"base as {packed}"),
        (size.adapter_bytes, "adapter and optimizer"),
        (size.gathered_bytes, "gathered" if packed == "none" else "a layer unpacked"),
        (size.activation_bytes, "activations"),
    )
    if size.answer_bytes > size.activation_bytes:
        parts = (*parts[:-1], (size.answer_bytes, "answers to held-out prompts"))
    shown = ", ".join(f"{name} {value / 2**30:.2f}" for value, name in parts if value or name != "gathered")
    return (
        f"memory per worker, estimated: {size.total_bytes() / 2**30:.2f} GiB ({shown}),"
        f" plus about 1 GiB for the process{f'; without {size.problem}' if size.problem else ''}"
    )


def _one_line(text: str, width: int = 300) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
