"""Results of an evaluation: metrics by name, for one model or for two side by side."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olora_ray.cluster import address
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.evaluation import AnyConfig
from olora_ray.config.schema import Config
from olora_ray.evaluation import lm_eval_tasks as tasks
from olora_ray.evaluation import rows
from olora_ray.evaluation.bootstrap import Interval, difference
from olora_ray.evaluation.command_line import Request
from olora_ray.evaluation.groups import group_numbers, origins
from olora_ray.evaluation.held_out import Answer, measure_and_answer
from olora_ray.evaluation.lm_eval_tasks import TaskResult, Tasks
from olora_ray.evaluation.rows import RowResults
from olora_ray.evaluation.targets import Target
from olora_ray.pipeline.base import with_tokenizer
from olora_ray.tokens import prepare
from olora_ray.train import scoring

logger = logging.getLogger(__name__)


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
    return Evaluation(target, held_out, tasks.run(sets, limit, target.base, adapter, config), groups, answers)


def differences(first: Evaluation, second: Evaluation) -> dict[str, Interval]:
    """First - second with a paired interval, for each metric that both have row by row on the same rows."""
    return dict(_differences(first, second))


def _differences(first: Evaluation, second: Evaluation) -> Iterator[tuple[str, Interval]]:
    ours, theirs = first.held_out, second.held_out
    if ours and theirs and ours.data == theirs.data:  # else tokens differ, and losses per token cannot be compared
        for name in ours.names():
            if rows.comparable(name, ours, theirs):
                found = rows.compare(name, ours, theirs, groups=first.groups)
                if found.groups > 1:  # one alone says nothing of the others
                    yield name, found.interval
    for task, mine in first.tasks.items():
        for name, values in mine.values.items():
            other = second.tasks[task].values.get(name, ())
            if len(values) == len(other) > 1:
                yield f"{task}/{name}", difference(values, other)
