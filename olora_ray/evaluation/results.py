"""Results of an evaluation: metrics by name, for one model or for two side by side."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from olora_ray.cluster import address
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import aligned
from olora_ray.config import command_line
from olora_ray.config.load import flatten
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.evaluation import lm_eval_tasks, rows
from olora_ray.evaluation.groups import group_numbers, origins
from olora_ray.evaluation.held_out import Answer, measure_and_answer
from olora_ray.evaluation.lm_eval_tasks import PAPER, TaskResult, Tasks
from olora_ray.evaluation.rows import Interval, RowResults, difference
from olora_ray.evaluation.targets import Target, run_of
from olora_ray.pipeline.base import with_tokenizer
from olora_ray.tokens import prepare
from olora_ray.tracking import client
from olora_ray.tracking.start import resolve_uri, start_run
from olora_ray.train import scoring

logger = logging.getLogger(__name__)

# The command line of pipelines/evaluate.py.


OPTIONS = ("--config", "--tasks", "--task-data", "--limit", "--scorer", "--out")


@dataclass(frozen=True)
class Request:
    """An evaluation as the command line asks for it."""

    models: tuple[str, ...]
    """One or two."""
    config: str | None
    changes: Mapping[str, Any]
    """Dotted field -> value, to be changed in the config."""
    tasks: tuple[str, ...]
    task_data: str | None
    limit: int | None
    """Rows of each task; None: all."""
    out: str | None


def read(argv: Sequence[str], usage: str) -> Request:
    """The request in `argv`; --help prints `usage` and exits. Raises UserError for what it does not know."""
    found = command_line.parse(argv, usage, options=OPTIONS)
    models, changes, options = tuple(found.names()), found.changes(), found.options
    names = [name for part in options.get("--tasks", "").split(",") if (name := part.strip())]
    limit = options.get("--limit", "")
    if not 1 <= len(models) <= 2:
        raise UserError(f"expected one model, or two to compare, not {len(models)}; --help shows how")
    if "--limit" in options and not (limit.isdecimal() and int(limit)):
        raise UserError(f"argument --limit: expected a number of rows, not {limit!r}")
    if scorer := options.get("--scorer"):  # an unset variable of a script is no wish for none
        changes["evaluation.scorer"] = scorer
    return Request(
        models=models,
        config=options.get("--config"),
        changes=changes,
        tasks=tuple(dict.fromkeys(each for name in names for each in (PAPER if name == "paper" else (name,)))),
        task_data=options.get("--task-data"),
        limit=int(limit) if limit else None,
        out=options.get("--out"),
    )


@dataclass(frozen=True)
class Evaluation:
    """One model's results."""

    target: Target
    held_out: RowResults | None
    tasks: Mapping[str, TaskResult]
    groups: Sequence[int] | None = None
    """Number of the group of each held-out row, by gate.group; None: each row of a file is one."""
    answers: Sequence[Answer] = ()
    """To the held-out prompts, where there is a scorer."""

    def metrics(self) -> dict[str, float]:
        """eval/loss, eval/perplexity, eval/SCORE, TASK/acc, TASK/acc_norm, ... -> value."""
        held_out = {name: self.held_out.metric(name) for name in self.held_out.names()} if self.held_out else {}
        return held_out | {
            f"{task}/{name}": item.metrics[name] for task, item in self.tasks.items() for name in item.metrics
        }

    def errors(self) -> dict[str, float]:
        """Standard errors of the tasks' metrics, under the same names."""
        return {f"{task}/{name}": error for task, item in self.tasks.items() for name, error in item.stderr.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.target.name,
            "base": self.target.base.to_json(),
            "adapter": self.target.adapter,
            "held_out": {"data": self.held_out.data, "rows": len(self.held_out.losses)} if self.held_out else None,
            "tasks": {name: item.rows for name, item in self.tasks.items()},
            "metrics": self.metrics(),
            "stderr": self.errors(),
        }


def check(request: Request, config: AnyConfig) -> None:
    """Raise UserError if nothing is to be done, the scorer cannot be, or Ray does not answer."""
    config.data.length()  # raises an error for auto, before anything starts
    if config.evaluation.scorer:
        scoring.resolve(config.evaluation.scorer)
    if not request.tasks and not config.data.holds_out():
        raise UserError(
            f"{request.models[0]}: nothing to evaluate it on: give --tasks, or --config with data.eval or"
            " data.eval_fraction"
        )
    if config.evaluation.scorer and not config.data.holds_out():
        logger.warning("evaluation.scorer: nothing is scored: no rows are held out")
    if storage.is_uri(config.run.storage):
        storage.check(config.run.storage, "run.storage")
    address.find()


def evaluate(target: Target, sets: Tasks, limit: int | None) -> Evaluation:
    """Everything about one model; needs ray.init. Raises UserError for what the user can fix."""
    logger.info(f"evaluating {target.name}")
    config, adapter = target.config, target.adapter
    held_out, groups = None, None
    answers: Sequence[Answer] = ()
    if config.data.holds_out():
        base = with_tokenizer(target.base, config)
        store = prepare.prepare(config, base.spec, "eval")
        if isinstance(config, Config) and config.gate.group is not None:
            # Before anything is measured: a column that no row has would cost all of it.
            groups = group_numbers(config.gate.group, prepare.plan_here(config, base.spec, "eval"), origins(store))
        held_out, answers = measure_and_answer(base, adapter, store, config)
    return Evaluation(target, held_out, lm_eval_tasks.run(sets, limit, target.base, adapter, config), groups, answers)


def differences(first: Evaluation, second: Evaluation) -> dict[str, Interval]:
    """First - second with a paired interval, for each metric that both have row by row on the same rows."""
    intervals = {}
    ours, theirs = first.held_out, second.held_out
    if ours and theirs and ours.data == theirs.data:  # else tokens differ, and losses per token cannot be compared
        for name in ours.names():
            if name not in theirs.names() or not set(ours.column(name).rows) & set(theirs.column(name).rows):
                continue
            found = rows.compare(name, ours, theirs, groups=first.groups)
            if found.groups > 1:  # one alone says nothing of the others
                intervals[name] = found.interval
    for task, mine in first.tasks.items():
        for name, values in mine.values.items():
            other = second.tasks[task].values.get(name, ())
            if len(values) == len(other) > 1:
                intervals[f"{task}/{name}"] = difference(values, other)
    return intervals


# Results as lines for a terminal.


def lines(results: Sequence[Evaluation], intervals: Mapping[str, Interval]) -> list[str]:
    """One model: value and standard error; two: both values, and the difference with its interval."""
    if len(results) == 1:
        return _one(results[0])
    first, second = results
    table: list[tuple[str, ...]] = [("metric", "rows", "first", "second", "first - second", "95% interval")]
    ours, theirs = first.metrics(), second.metrics()
    for name in ours | theirs:
        found = intervals.get(name)
        interval = f"[{found.low:+.4f}, {found.high:+.4f}]" if found else "not paired"
        values = (f"{each[name]:.4f}" if name in each else "-" for each in (ours, theirs))
        change = f"{ours[name] - theirs[name]:+.4f}" if name in ours and name in theirs else "-"
        table.append((name, _rows_cell(first if name in ours else second, name), *values, change, interval))
    return [f"first:  {first.target.name}", f"second: {second.target.name}", "", *_columns(table)]


def _one(result: Evaluation) -> list[str]:
    table = [("metric", "rows", "value", "stderr")]
    errors = result.errors()
    for name, value in result.metrics().items():
        error = f"{errors[name]:.4f}" if name in errors else ""
        table.append((name, _rows_cell(result, name), f"{value:.4f}", error))
    return [f"model: {result.target.name}", "", *_columns(table)]


def _rows_cell(result: Evaluation, metric: str) -> str:
    task = metric.partition("/")[0]
    if task in result.tasks:
        return result.tasks[task].rows
    assert result.held_out is not None
    return f"held-out[:{len(result.held_out.column(metric).rows)}]"


def _columns(table: Sequence[tuple[str, ...]]) -> list[str]:
    shown = aligned(table, right=[number > 1 for number in range(len(table[0]))])
    return [shown[0], "-" * len(shown[0]), *shown[1:]]


# Saves results: in evaluation.json, answers line by line in answers.jsonl, and in an MLflow run per model.


FILE = "evaluation.json"
ANSWERS = "answers.jsonl"
"""One line for each answer that was scored."""


def check_tracking(request: Request) -> None:
    """Raise UserError if results could not be written where they go: nothing is measured for a file that cannot be."""
    if folder := _folder(request):
        storage.check(folder, "argument --out")


def tracking_address(request: Request, targets: Sequence[Target]) -> str | None:
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
    tree = {
        "models": [result.to_json() for result in results],
        "limit": request.limit,
        "differences": {name: asdict(found) for name, found in intervals.items()},
    }
    text = json.dumps(tree, indent=2) + "\n"
    if folder := _folder(request):
        answers = [{"model": result.target.name, **asdict(item)} for result in results for item in result.answers]
        lines = "".join(json.dumps(answer) + "\n" for answer in answers)
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
    return (
        command_line.absolute(request.out, command_line.lasting(Path.cwd()))
        if request.out
        else run_of(request.models[0])
    )


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
