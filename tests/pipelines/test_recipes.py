"""The recipes' rows: the same each time, such that a run takes them, and with held-out questions of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config import command_line
from olora_ray.config.load import load_config
from olora_ray.pipeline.dry_run import dry_run
from tests.pipelines import project

RECIPES = sorted(
    page.parent for page in (project.ROOT / "pipelines" / "recipes").glob("*/README.md")
)


def asked(file: Path) -> set[str]:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
    ]
    turns = [
        turn
        for row in rows
        for turn in row.get(
            "messages", [{"role": "user", "content": row.get("prompt", row.get("text"))}]
        )
    ]
    return {turn["content"] for turn in turns if turn["role"] == "user"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe.name))
def test_the_rows_of_a_recipe_are_the_same_each_time_and_taken_by_its_run(
    recipe: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(project.ROOT / "pipelines")  # as the commands do, for the scorer
    check_rows(recipe, tiny_model, tmp_path)
    assert capsys.readouterr().out.count(", none rejected") == 2


def check_rows(recipe: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Make a recipe's rows twice, and plan its run on them, which prints how many rows it rejects."""
    for folder in ("first", "again"):
        subprocess.run([sys.executable, recipe / "make_rows.py", tmp_path / folder], check=True)
    train, held_out = (tmp_path / "first" / name for name in ("train.jsonl", "heldout.jsonl"))
    assert [file.read_bytes() for file in (train, held_out)] == [
        (tmp_path / "again" / file.name).read_bytes() for file in (train, held_out)
    ]
    assert asked(train).isdisjoint(asked(held_out))
    changes = {
        "data.train.0.path": str(train),
        "data.eval.0.path": str(held_out),
        "data.max_length": 4096,
    }
    changes |= {
        "run.storage": str(tmp_path),
        "model.name": str(tiny_model),
        "data.max_rejected": 0.0,
    }
    dry_run(command_line.resolved(load_config(recipe / "config.yaml", changes), project.ROOT))
    assert len(held_out.read_text(encoding="utf-8").splitlines()) >= 50
