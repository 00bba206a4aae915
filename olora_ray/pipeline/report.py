"""What a person reads: the plan before, the dry run, the comparison after."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from olora_ray.cluster.spec import Outcome, Task
from olora_ray.config.schema import Config, dump
from olora_ray.data.tokenize import spec_from_pretrained
from olora_ray.model import source
from olora_ray.pipeline import publish
from olora_ray.pipeline.monitor import batch_split
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens import store
from olora_ray.tracking import run
from olora_ray.tracking.run import Tracker
from olora_ray.train import scoring
from olora_ray.train.estimate import Size, estimate
from olora_ray.train.loader import total_steps

Say = Callable[[str], None]
Scores = dict[str, dict[str, float]]
"""{"before": {name: mean}, "after": {name: mean}}."""


def plan(config: Config, base: source.BaseModel, say: Say) -> None:
    """The size of the run; raises UserError for targets, rank or scorer that cannot be."""
    if config.evaluation.scorer:
        scoring.resolve(config.evaluation.scorer)
    size = estimate(config, base)
    say(_model_line(config, size))
    say(_memory_line(config, size))


def steps(task: Task, say: Say) -> None:
    """The arithmetic of the training."""
    if task.train.complete:
        manifest = task.train.manifest
        say(_steps_line(task.config, len(task.train), manifest.tokens, manifest.supervised, about=False))
    else:
        train = task.config.train
        length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
        split = batch_split(task.config, task.config.cluster.most())
        say(f"training: {length}; {split}; tokens come in {task.train.shard_count:,} shards")


def dry_run(config: Config, say: Say) -> None:
    """Resolve everything, print it, start nothing: no Ray, no MLflow run, no file but a converted model."""
    base = source.obtain(config, say, publish.registered(config))
    tokenizer = source.load_tokenizer(base, config.model)
    preview = store.describe(config, spec_from_pretrained(tokenizer))
    size = estimate(config, base)
    print(dump(config))
    print(f"target layers ({len(size.targets)}):")
    for name, (m, n) in size.targets.items():
        print(f"  {name} {m} x {n}")
    say(_model_line(config, size))
    say(_steps_line(config, preview.packs, preview.tokens, preview.supervised, about=not preview.exact))
    say(_memory_line(config, size))
    print("\nfirst example, supervised tokens in [[ ]]:\n")
    print(_marked(tokenizer, preview.input_ids.tolist(), preview.mask.tolist()))


def already_finished(config: Config, result: dict[str, Any], say: Say) -> None:
    """Say that there is nothing to do, and what came out."""
    loss = result.get("metrics", {}).get("eval/loss")
    shown = f", eval loss {loss:.4f}" if loss is not None else ""
    say(
        f"run {config.run.name!r} is finished already{shown}: see {config.folder()};"
        " to train again, set another run.name or delete that folder"
    )


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with its answers, as text."""

    prompt: str
    reference: str
    before: str
    after: str


def texts(outcome: Outcome, tokenizer: Any) -> list[Sample]:
    """The answers of a run as text."""

    def text(ids: Sequence[int], special: bool = False) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special)).strip()

    return [
        Sample(text(item.prompt, special=True), text(item.reference), text(item.before), text(item.after))
        for item in outcome.answers
    ]


def score(config: Config, answers: Sequence[Sample]) -> Scores:
    """Mean scores over the held-out answers before and after training; empty without a scorer."""
    if not config.evaluation.scorer or not answers:
        return {}
    judge = scoring.resolve(config.evaluation.scorer)
    return {
        "before": _means([judge(item.before, item.reference) for item in answers]),
        "after": _means([judge(item.after, item.reference) for item in answers]),
    }


@dataclass(frozen=True)
class Finished:
    """What came out of a run."""

    result: dict[str, Any]
    """The content of result.json."""
    summary: tuple[str, ...]
    """Lines for a person."""

    def show(self, say: Say) -> None:
        """Print the summary."""
        for line in self.summary:
            say(line) if line else print()


def finish(
    task: Task,
    folder: RunFolder,
    tracker: Tracker,
    outcome: Outcome,
    answers: Sequence[Sample],
    parity: dict[str, Any],
    version: int | None,
) -> Finished:
    """Log the scores and the last pictures and tables; safe to repeat.

    Raises TrackingAway if MLflow does not answer: result.json must not be written before all is logged.
    """
    scores = score(task.config, answers)
    result = _result(task, tracker, outcome, scores, parity, version)
    assert outcome.state is not None
    tracker.metrics({outcome.state.step: {f"score/{name}": value for name, value in scores.get("after", {}).items()}})
    tracker.metrics({0: {f"score/{name}": value for name, value in scores.get("before", {}).items()}})
    history = outcome.state.history
    tracker.learning_curve(_points(history, "train/loss"), _points(history, "eval/loss"))
    columns = ("prompt", "reference", "before", "after")
    tracker.table("samples", columns, [[getattr(item, name) for name in columns] for item in answers])
    tracker.text(json.dumps(result, indent=2) + "\n", "result.json")
    return Finished(result, tuple(_summary(task, folder, tracker, outcome, answers, scores, version)))


def _result(
    task: Task, tracker: Tracker, outcome: Outcome, scores: Scores, parity: dict[str, Any], version: int | None
) -> dict[str, Any]:
    assert outcome.state is not None
    state = outcome.state
    last: dict[str, float] = {}
    for row in state.history:
        last |= {name: value for name, value in row.items() if name != "step"}
    if state.best_loss is not None:
        last["eval/loss"] = state.best_loss
    first = next((row["eval/loss"] for row in state.history if "eval/loss" in row), None)
    return {
        "run": task.config.run.name,
        "steps": state.step,
        "stopped_early": outcome.stopped_early,
        "best_step": state.best_step if state.best_step is not None else state.step,
        "metrics": last,
        "eval_loss_before": first,
        "scores": scores,
        "base": asdict(task.base),
        "data": {"train": task.train.digest, "eval": task.eval.digest if task.eval else None},
        "parity": parity,
        "mlflow": {"uri": run.shown_uri(tracker.uri), "run_id": tracker.run_id},
        "registered": {"model": task.config.registry.model, "version": version, "alias": task.config.registry.alias}
        if version is not None
        else None,
    }


def _summary(
    task: Task,
    folder: RunFolder,
    tracker: Tracker,
    outcome: Outcome,
    answers: Sequence[Sample],
    scores: Scores,
    version: int | None,
) -> list[str]:
    config, state = task.config, outcome.state
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
        lines.append(f"held-out {name}: {scores['before'][name]:.3f} before, {value:.3f} after ({len(answers)} rows)")
    lines += [f"adapter (PEFT, vLLM): {folder.adapter}", f"merged model:         {folder.merged}"]
    if version is not None:
        uri = f"models:/{config.registry.model}@{config.registry.alias}"
        where = f"MLFLOW_TRACKING_URI={run.shown_uri(tracker.uri)}"
        lines += [
            f"registered:           {config.registry.model} version {version} ({uri})",
            f'load:   mlflow.set_tracking_uri("{run.shown_uri(tracker.uri)}"); mlflow.transformers.load_model("{uri}")',
            f"serve:  {where} mlflow models serve -m {uri} --env-manager local -p 5001",
        ]
    store = run.shown_uri(tracker.uri)
    page = tracker.url() or f"mlflow ui --backend-store-uri {store} (run {tracker.run_id})"
    lines.append(f"MLflow: {page}")
    return lines


def _model_line(config: Config, size: Size) -> str:
    share = size.trainable / size.parameters
    return (
        f"model: {size.parameters / 1e6:,.1f} M parameters; {config.adapter.method} rank {config.adapter.rank} on"
        f" {len(size.targets)} layers: {size.trainable / 1e6:,.2f} M trainable ({share:.2%})"
    )


def _steps_line(config: Config, packs: int, tokens: int, supervised: int, about: bool) -> str:
    train = config.train
    return (
        f"training: {'about ' if about else ''}{total_steps(train, packs)} steps;"
        f" {batch_split(config, config.cluster.most())};"
        f" an epoch has {packs:,} sequences, {tokens:,} tokens, {supervised:,} of them supervised"
    )


def _memory_line(config: Config, size: Size) -> str:
    parts = (
        (size.base_bytes, "base"),
        (size.adapter_bytes, "adapter and optimizer"),
        (size.activation_bytes, "activations"),
    )
    shown = ", ".join(f"{name} {value / 2**30:.2f}" for value, name in parts)
    return (
        f"memory a worker, estimated: {size.total_bytes() / 2**30:.2f} GiB ({shown}), plus about 1 GiB for the process"
    )


def _marked(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    text, start = "", 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or mask[stop] != mask[start]:
            part = tokenizer.decode(ids[start:stop])
            text += f"[[{part}]]" if mask[start] else part
            start = stop
    return text


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _points(history: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[name]) for row in history if name in row]


def _one_line(text: str, width: int = 300) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
