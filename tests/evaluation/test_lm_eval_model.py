"""lm-eval gives the same results if its requests are split over actors and put together again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import build
from olora_ray.evaluation import held_out, lm_eval_tasks
from olora_ray.model.source import BaseModel
from tests.evaluation import harness, sets
from tests.pipelines import project

pytest.importorskip("lm_eval")
NAMES = ("arc_easy", "boolq")
LIMIT = sets.ROWS - 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("harness")
    return project.make_model(folder / "model"), sets.write(folder / "sets")


def in_turn(make: Callable[[], Any], works: Sequence[Any], *_: Any) -> list[Any]:
    """Do the work of Ray's actors, one work after the other and the last one first."""
    worker = make()
    return list(reversed([worker(work) for work in reversed(works)]))


def test_every_number_is_the_same(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "map_over_actors", in_turn)
    model, data = folders
    settings = build(project.settings(tmp_path, model))
    loaded = lm_eval_tasks.load_tasks(NAMES, str(data))
    assert LIMIT * 6 > lm_eval_tasks.PIECE, "requests travel in several pieces"
    found = lm_eval_tasks.run(loaded, LIMIT, BaseModel(str(model), str(model), ""), None, settings)
    expected = harness.by_lm_eval(model, data, tmp_path, NAMES, LIMIT)
    for name, item in found.items():
        assert set(item.metrics) == ({"acc", "acc_norm"} if name == "arc_easy" else {"acc"})
        for metric, value in item.metrics.items():
            assert value == expected[name][f"{metric},none"]
            assert item.stderr[metric] == expected[name][f"{metric}_stderr,none"]
            assert sum(item.values[metric]) / LIMIT == pytest.approx(value)
