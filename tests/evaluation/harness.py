"""lm-eval alone on small data sets, with its own loading of data (the arrow files), models and tasks."""

from pathlib import Path
from typing import Any


def by_lm_eval(
    model: Path, data: Path, folder: Path, tasks: tuple[str, ...], limit: int
) -> dict[str, dict[str, Any]]:
    """Return lm-eval's results for a model folder on the first rows of `data` (see sets.write), using `folder`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks"
    for task, origin, place, more in (
        ("arc_easy", "arc/arc_easy.yaml", "ai2_arc/ARC-Easy", ""),
        (
            "boolq",
            "super_glue/boolq/default.yaml",
            "boolq/none",
            'doc_to_target: "{{answer|int}}"\n',
        ),
    ):
        (file,) = (data / place / "validation").glob("*.arrow")
        (folder / f"{task}.yaml").write_text(
            f"include: {own / origin}\ntask: {task}\ndataset_path: arrow\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{validation: {file}}}, cache_dir: {folder / 'cache'}}}\n"
            f"training_split: null\ntest_split: null\n{more}"
        )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        limit=limit,
        batch_size=3,
    )
    return dict(found["results"])
