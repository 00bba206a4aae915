"""lm-eval over requests that were taken apart and put together again says what lm-eval says by itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import build
from olora_ray.evaluation import held_out, lm_eval_tasks
from olora_ray.model.source import BaseModel
from tests.evaluation import sets
from tests.pipelines import project

pytest.importorskip("lm_eval")
NAMES = ("arc_easy", "boolq")
LIMIT = sets.ROWS - 1


def by_lm_eval(model: Path, data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's own results for the first rows, with its own loading of data, models and tasks; `folder` is for it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks"
    for task, origin, place, more in (
        ("arc_easy", "arc/arc_easy.yaml", "ai2_arc/ARC-Easy", ""),
        ("boolq", "super_glue/boolq/default.yaml", "boolq/none", 'doc_to_target: "{{answer|int}}"\n'),
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
        tasks=list(NAMES),
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        limit=LIMIT,
        batch_size=3,
    )
    assert found is not None
    return dict(found["results"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("harness")
    return project.make_model(folder / "model"), sets.write(folder / "sets")


def in_turn(make: Callable[[], Any], works: Sequence[Any], *_: Any) -> list[Any]:
    """What Ray's actors do, one work after the other and the last one first."""
    worker = make()
    return list(reversed([worker(work) for work in reversed(works)]))


def test_every_number_is_the_same(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "map_over_actors", in_turn)
    model, data = folders
    settings = build(project.settings(tmp_path, model))
    loaded = lm_eval_tasks.load(NAMES, str(data))
    assert LIMIT * 6 > lm_eval_tasks.PIECE, "requests travel in several pieces"
    found = lm_eval_tasks.run(loaded, LIMIT, BaseModel(str(model), str(model), ""), None, settings)
    expected = by_lm_eval(model, data, tmp_path)
    for name, item in found.items():
        assert set(item.metrics) == ({"acc", "acc_norm"} if name == "arc_easy" else {"acc"})
        for metric, value in item.metrics.items():
            assert value == expected[name][f"{metric},none"]
            assert item.stderr[metric] == expected[name][f"{metric}_stderr,none"]
            assert sum(item.values[metric]) / LIMIT == pytest.approx(value)
