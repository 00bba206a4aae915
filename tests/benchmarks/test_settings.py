"""The settings experiment: its whole plan runs to the end without a training, and two processes never share one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.train.loader import Schedule, StepLoader
from tests import tiny


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


@pytest.mark.parametrize(
    ("losses", "factor"),
    [
        ({}, 1.0),
        ({1.0: 2, 0.5: 3}, 2.0),
        ({1.0: 2, 0.5: 3, 2.0: math.inf}, 0.7071),
        ({1.0: 2, 0.5: 3, 2.0: 2.5}, 1.4142),
        ({1.0: 2, 0.5: 1, 2.0: 3}, 0.25),
        ({1.0: 2, 0.5: 3, 2.0: 1}, 4.0),
        ({1.0: 2, 0.5: 3, 2.0: 1, 4.0: 0.5}, None),
    ],
)
def test_the_fourth_rate_follows_from_three(settings: Any, losses: dict[float, float], factor: float | None) -> None:
    assert settings.following(losses) == factor


def test_a_training_is_claimed_once(settings: Any, tmp_path: Path) -> None:
    training = settings.Training(settings.GRID[0], 101, 1.0)
    with settings.claim(tmp_path, training) as mine, settings.claim(tmp_path, training) as second:
        assert (mine, second) == (True, False)
    with settings.claim(tmp_path, training) as again:
        assert again


def test_a_diverged_training_ends_its_statement(settings: Any) -> None:
    """A pair without a loss is not left out of the mean: the other pairs would be a selection."""
    lines = [result(settings, settings.Training(cell, 101, f)) for cell in settings.GRID for f in settings.COARSE]
    results = settings.Results(lines)
    for seed in (201, 202):
        lines += [result(settings, each) for each in settings.missing(results) if each.seed == seed]
    lines = json.loads(json.dumps(lines))
    for line in lines:
        if line["seed"] == 202 and line["rank"] == 16:
            line |= {"loss": None, "rows": []}
    text = settings.statements(settings.Results(lines), settings.PLAN[0])
    assert "diverged" in text


def test_a_training_continues_from_its_saved_state(settings: Any, tmp_path: Path) -> None:
    def losses(done: dict[str, Any], stop: int) -> list[float]:
        trainer, store = tiny.trainer(tiny.config(train__global_batch=2, train__micro_batch=1)), tiny.store(8)
        train = trainer.config.train.model_copy(update={"steps": 6})
        loader = StepLoader(store, train, 0, "segments")
        for found in settings.steps(trainer, loader, Schedule(train, store), done):
            if len(found) == stop:
                settings.save(tmp_path / "state.pt", trainer, {"losses": found})
                break
        return found

    whole = losses({"losses": []}, 6)
    assert losses({"losses": []}, 3) == whole[:3]
    assert losses(torch.load(tmp_path / "state.pt"), 6) == whole
