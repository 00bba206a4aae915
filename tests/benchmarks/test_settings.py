"""The settings experiment: its whole plan runs to the end without a training, and two processes never share one."""

import math
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def settings(benchmark: Any) -> Any:
    return benchmark("settings")


def result(module: Any, training: Any) -> dict[str, Any]:
    """A line as `train` returns it: the best rate is twice the automatic one, and the rank decides."""
    cell, seed, factor = training
    loss = 3 / cell.rank + 0.001 * seed + math.log2(factor / 2) ** 2 / 100
    rows = {"rows": [(10, loss * 10), (20, loss * 20 + 1)]} if seed != module.TUNING_SEED else {}
    other = {"auto": 1e-3, "step_cpu": 1.0, "cpu": 2 * cell.steps}
    return {**vars(cell), "seed": seed, "factor": factor, "loss": loss, **other, **rows}


def test_the_plan_ends_and_its_tables_have_every_statement(settings: Any, tmp_path: Path) -> None:
    path, done = tmp_path / "settings.jsonl", []
    while trainings := settings.missing(settings.read(path)):
        for each in trainings:
            settings.append(path, result(settings, each))
        done += trainings
    assert len(set(done)) == len(done)
    assert {each.factor for each in done[:81]} == {1.0}  # a map of all cells comes first
    for stage in settings.PLAN:
        seeds = {each.seed for each in done if (each.cell.steps, each.cell.dtype) == (stage.steps, stage.dtype)}
        assert len(seeds - {settings.TUNING_SEED}) >= stage.seeds
    text = settings.shown(settings.read(path))
    assert text.count("new  ") == 6  # three tasks at 20 and at 200 steps
    assert "lora r<=64: lora 64/64 x2" in text
    assert settings.left(settings.read(path)).count("\n") == 1
