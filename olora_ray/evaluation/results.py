"""An evaluation of one model, or of two side by side: its command line, its results as lines, and where they are kept.

Results go to evaluation.json, scored answers line by line to answers.jsonl, and metrics to an MLflow run per model.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from olora_ray.cluster import address, connection, preflight
from olora_ray.cluster.decide import decide_evaluation, length_of
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.statistics import Interval, difference
from olora_ray.common.text import aligned
from olora_ray.config import command_line
from olora_ray.config.load import flatten
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.evaluation import lm_eval_tasks, rows, targets
from olora_ray.evaluation.groups import group_names, origins
from olora_ray.evaluation.held_out import Answer, measure
from olora_ray.evaluation.lm_eval_tasks import PAPER, TaskResult, Tasks
from olora_ray.evaluation.rows import RowResults
from olora_ray.evaluation.targets import Target, run_of
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import find_model, with_tokenizer
from olora_ray.tokens import prepare
from olora_ray.tracking import client, models
from olora_ray.tracking.start import resolve_uri, start_run
from olora_ray.train.scoring import Judge, Metric

logger = logging.getLogger(__name__)

# The command line of pipelines/evaluate.py.


OPTIONS = ("--config", "--tasks", "--task-data", "--limit", "--scorer", "--out")


@dataclass(frozen=True)
class EvalRequest:
    models: tuple[str, ...]
    """One or two."""
    config: str | None
    changes: Mapping[str, Any]
    """Dotted field of the config -> its new value."""
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    """Number of rows of each task; None: all."""
    out: str | None = None
    own: Sequence[Metric] = ()
    """Metrics over all answers."""


def read_request(argv: Sequence[str], usage: str) -> EvalRequest:
    """Parse `argv`; --help prints `usage` and exits. Raises UserError for unknown or wrong arguments."""
    arguments = command_line.parse(argv, usage, options=OPTIONS)
    models = tuple(arguments.names())
    changes = arguments.changes()
    options = arguments.options
    limit = options.get("--limit", "")
    if not 1 <= len(models) <= 2:
        raise UserError(
            f"arguments: expected one model, or two to compare, not {len(models)}; --help shows how"
        )
    if "--limit" in options and not (limit.isdecimal() and int(limit)):
        raise UserError(f"argument --limit: expected a number of rows, not {limit!r}")
    # A script with an unset variable passes an empty --scorer; the scorer of the config then stays.
    scorer = options.get("--scorer")
    if scorer:
        changes["evaluation.scorer"] = scorer
    tasks: list[str] = []
    for part in options.get("--tasks", "").split(","):
        name = part.strip()
        if name == "paper":
            tasks += PAPER
        elif name:
            tasks.append(name)
    return EvalRequest(
        models=models,
        config=options.get("--config"),
        changes=changes,
        tasks=tuple(dict.fromkeys(tasks)),
        task_data=options.get("--task-data"),
        limit=int(limit) if limit else None,
        out=options.get("--out"),
    )


@dataclass(frozen=True)
class EvalResult:
    target: Target
    held_out: RowResults | None
    tasks: Mapping[str, TaskResult]
    answers: Sequence[Answer] = ()
    """Answers to held-out prompts; empty without evaluation.scorer."""
    own: Mapping[str, float] = field(default_factory=dict)
    """Results of the request's own metrics."""

    def metrics(self) -> dict[str, float]:
        """Return eval/loss, eval/perplexity, eval/SCORE, TASK/acc, TASK/acc_norm, ... -> value."""
        metrics: dict[str, float] = {}
        if self.held_out is not None:
            for name in self.held_out.names():
                metrics[name] = self.held_out.metric(name)
        for task, item in self.tasks.items():
            for name, value in item.metrics.items():
                metrics[f"{task}/{name}"] = value
        return {**metrics, **self.own}

    def errors(self) -> dict[str, float]:
        errors = {}
        for task, item in self.tasks.items():
            for name, error in item.stderr.items():
                errors[f"{task}/{name}"] = error
        return errors

    def to_json(self) -> dict[str, Any]:
        held_out = None
        if self.held_out is not None:
            held_out = {"data": self.held_out.data, "rows": len(self.held_out.losses)}
        return {
            "model": self.target.name,
            "base": self.target.base.to_json(),
            "adapter": self.target.adapter,
            "held_out": held_out,
            "tasks": {name: item.rows for name, item in self.tasks.items()},
            "metrics": self.metrics(),
            "stderr": self.errors(),
        }


def run(request: EvalRequest) -> tuple[list[EvalResult], dict[str, Interval]]:
    """Measure the models, write the results, and return them with the intervals of the differences of two."""
    request = replace(request, models=tuple(models.uri_of(each) or each for each in request.models))
    config = targets.settings(request.models, request.config, request.changes)
    check_request(request, config)
    folder = _folder(request)
    if folder is not None:
        storage.check_storage(folder, "argument --out")
    # Tasks and models are looked up before a cluster is started, so that a wrong name costs no waiting.
    sets = lm_eval_tasks.load_tasks(request.tasks, request.task_data)
    found = [targets.resolve(name, config) for name in request.models]
    uri = tracking_address(request, found)
    with connection.connect(config) as (_, cluster), user_errors():
        preflight.require(decide_evaluation(config, cluster), cluster)
        base = partial(base_of_pairs, found, config)
        measured = [evaluate(target, cluster, sets, request.limit, base) for target in found]
    measured = [replace(each, own=own_metrics(request.own, each.answers)) for each in measured]
    intervals = {}
    if len(measured) == 2:
        intervals = differences(*measured)
    write_results(request, measured, intervals, uri)
    return measured, intervals


def own_metrics(metrics: Sequence[Metric], answers: Sequence[Answer]) -> dict[str, float]:
    """Return eval/NAME -> value; raise UserError if there are no answers."""
    rows = [each.as_row() for each in answers]
    if metrics and not rows:
        raise UserError("metrics: no held-out row has a question and an answer to measure")
    found: dict[str, float] = {}
    for metric in metrics:
        found |= {f"eval/{name}": value for name, value in metric(rows).items()}
    return found


def check_request(request: EvalRequest, config: AnyConfig) -> None:
    """Raise UserError if there is nothing to evaluate, the scorer cannot be used, or Ray does not answer."""
    length_of(config)
    if config.evaluation.scorer:
        Judge(config.evaluation.scorer)
    if not request.tasks and not config.data.holds_out():
        raise UserError(
            f"{request.models[0]}: no rows to evaluate it on; set --tasks, or --config with data.eval or"
            " data.eval_fraction"
        )
    if config.evaluation.scorer and not config.data.holds_out():
        logger.warning(
            "evaluation.scorer: no answers to score, because no rows are held out; set data.eval"
        )
    if storage.is_uri(config.run.storage):
        storage.check_storage(config.run.storage, "run.storage")
    address.find()


def base_of_pairs(found: Sequence[Target], config: AnyConfig) -> BaseModel:
    """Return the base model against which preference pairs are measured, the same for both models.

    Raises UserError if no config and no second model says which it is.
    """
    for target in found:
        if target.adapter is not None:
            return target.base
    if isinstance(config, Config):
        return find_model(config)
    if len(found) == 1:
        raise UserError(
            f"{found[0].name}: preference pairs are measured against a base model, and these files do not name theirs:"
            " add it as second model, or --config with the config of the training"
        )
    return found[1].base


def evaluate(
    target: Target,
    cluster: ClusterFacts,
    sets: Tasks,
    limit: int | None,
    base_of_pairs: Callable[[], BaseModel] | None = None,
) -> EvalResult:
    """Measure one model on held-out rows and tasks; needs ray.init. Raises UserError for what the user can fix."""
    logger.info(f"evaluating {target.name}")
    config = decide_evaluation(target.config, cluster)
    held_out = None
    answers: Sequence[Answer] = ()
    if config.data.holds_out():
        base = with_tokenizer(target.base, config)
        config = decide_evaluation(target.config, cluster, base.spec)
        store = prepare.prepare(config, base.spec, "eval")
        group = config.gate.group if isinstance(config, Config) else None
        names: Sequence[str] = ()
        if group is not None:
            # Groups come first: a gate.group that no row has must fail before the long measurement, not after it.
            plan = prepare.plan_here(config, base.spec, "eval")
            names = group_names(group, plan, origins(store))
        held_out, answers = measure(base, target.adapter, store, config, base_of_pairs)
        if names:
            held_out = held_out.grouped(names)
    tasks = lm_eval_tasks.run(sets, limit, target.base, target.adapter, config)
    return EvalResult(target, held_out, tasks, answers)


def differences(first: EvalResult, second: EvalResult) -> dict[str, Interval]:
    """Return first - second with a paired interval, for each metric that both have row by row on the same rows."""
    intervals = {}
    ours = first.held_out
    theirs = second.held_out
    # Models with different tokenizers have different tokens, so their losses per token cannot be compared.
    if ours and theirs and ours.data == theirs.data:
        for name in ours.names():
            if name not in theirs.names():
                continue
            if not set(ours.column(name).rows) & set(theirs.column(name).rows):
                continue
            comparison = rows.compare(name, ours, theirs)
            # A single group shows no variation, so its interval would have width 0.
            if comparison.groups > 1:
                intervals[name] = comparison.interval
    for task, mine in first.tasks.items():
        for name, values in mine.values.items():
            other = second.tasks[task].values.get(name, ())
            if len(values) == len(other) > 1:
                intervals[f"{task}/{name}"] = difference(values, other)
    return intervals


# Results as lines for a terminal.


def lines(results: Sequence[EvalResult], intervals: Mapping[str, Interval]) -> list[str]:
    first = results[0]
    second = results[-1]
    ours = first.metrics()
    if len(results) == 1:
        table: list[tuple[str, ...]] = [("metric", "rows", "value", "stderr")]
        errors = first.errors()
        for name, value in ours.items():
            error = f"{errors[name]:.4f}" if name in errors else ""
            table.append((name, _rows_cell(first, name), f"{value:.4f}", error))
        return [f"model: {first.target.name}", "", *_columns(table)]
    table = [("metric", "rows", "first", "second", "first - second", "95% interval")]
    theirs = second.metrics()
    for name in ours | theirs:
        measured = _rows_cell(first if name in ours else second, name)
        values = [f"{each[name]:.4f}" if name in each else "-" for each in (ours, theirs)]
        change = "-"
        if name in ours and name in theirs:
            change = f"{ours[name] - theirs[name]:+.4f}"
        interval = "not paired"
        if name in intervals:
            interval = f"[{intervals[name].low:+.4f}, {intervals[name].high:+.4f}]"
        table.append((name, measured, *values, change, interval))
    return [f"first:  {first.target.name}", f"second: {second.target.name}", "", *_columns(table)]


def _rows_cell(result: EvalResult, metric: str) -> str:
    task = metric.partition("/")[0]
    if task in result.tasks:
        return result.tasks[task].rows
    assert result.held_out is not None
    return f"held-out[:{len(result.held_out.column(metric).rows)}]"


def _columns(table: Sequence[tuple[str, ...]]) -> list[str]:
    shown = aligned(table, right=[number > 1 for number in range(len(table[0]))])
    return [shown[0], "-" * len(shown[0]), *shown[1:]]


# Results are kept in evaluation.json, answers.jsonl and an MLflow run per model.


FILE = "evaluation.json"
ANSWERS = "answers.jsonl"
"""One line of JSON per scored answer."""


def tracking_address(request: EvalRequest, targets: Sequence[Target]) -> str | None:
    """Return the address of MLflow; None if no config, no run and no MLFLOW_TRACKING_URI sets one.

    Raises UserError or TrackingUnavailable if MLflow does not answer.
    """
    configured = request.config or any(run_of(name) for name in request.models)
    registered = any(name.startswith(models.SCHEME) for name in request.models)
    if not (
        configured
        or registered
        or "tracking.uri" in request.changes
        or os.environ.get("MLFLOW_TRACKING_URI")
    ):
        return None
    uri = resolve_uri(targets[0].config)
    client.check_uri(uri)
    return uri


def write_results(
    request: EvalRequest,
    results: Sequence[EvalResult],
    intervals: Mapping[str, Interval],
    uri: str | None,
) -> None:
    """Write the results to --out or the first model's run folder, and then to the MLflow at `uri`.

    Raises TrackingUnavailable if MLflow does not answer; the files are written by then.
    """
    tree = {
        "models": [result.to_json() for result in results],
        "limit": request.limit,
        "differences": {name: asdict(interval) for name, interval in intervals.items()},
    }
    text = json.dumps(tree, indent=2) + "\n"
    folder = _folder(request)
    if folder is not None:
        answers = ""
        for result in results:
            for item in result.answers:
                answers += json.dumps({"model": result.target.name, **asdict(item)}) + "\n"
        files = {FILE: text}
        if answers:
            files[ANSWERS] = answers
        for name, content in files.items():
            storage.write_text(storage.join(folder, name), content)
            logger.info(f"written: {storage.join(folder, name)}")
        stale = storage.join(folder, ANSWERS)
        if not answers and storage.exists(stale):
            logger.warning(
                f"{stale}: left by an earlier evaluation; this evaluation scored no answers"
            )
    if uri is None:
        return
    for result in results:
        _track(result, text)
    logger.info(
        f"logged: {len(results)} run(s) with the tag olora.kind=evaluation in {client.shown_uri(uri)}"
    )


def _folder(request: EvalRequest) -> str | None:
    if not request.out:
        return run_of(request.models[0])
    # In a Ray job the working directory is deleted after the job, so `lasting` replaces it.
    return command_line.absolute(request.out, command_line.lasting())


def _track(result: EvalResult, text: str) -> None:
    target = result.target
    tags = {
        "olora.kind": "evaluation",
        "olora.model": target.name,
        "olora.base_digest": target.base.digest,
    }
    parts = target.name.replace("://", "/").rstrip("/").split("/")[-2:]
    tracker = start_run(target.config, f"evaluation of {'-'.join(filter(None, parts))}", tags)
    settings = flatten(target.config).items()
    tracker.params(
        {name: value for name, value in settings if name.startswith(("model.", "evaluation."))}
    )
    metrics = result.metrics()
    errors = {f"{name}_stderr": error for name, error in result.errors().items()}
    tracker.metrics({0: {**metrics, **errors}})
    held_out = result.held_out
    of_rows: list[str] = []
    data = None
    if held_out is not None:
        paths = ", ".join(source.path for source in target.config.data.eval)
        shown = paths or "held out from training"
        tracker.dataset("evaluation", held_out.data, shown, len(held_out.losses), "evaluation")
        of_rows = held_out.names()
        data = ("evaluation", held_out.data)
    model_id = target.version and target.version.model_id
    if not model_id and target.run_id:
        model_id = models.of_run(tracker.uri, target.run_id)
    if model_id and tracker.evaluates(model_id):
        tracker.of_model(model_id, 0, of_rows, data)
        tracker.of_model(model_id, 0, [name for name in metrics if name not in of_rows])
    tracker.text(text, FILE)
    tracker.end("FINISHED")
