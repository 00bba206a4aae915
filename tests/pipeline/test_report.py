"""The last lines of a run are commands that work as they are printed."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.cluster.spec import TrainResult
from olora_ray.pipeline.export import Exported
from olora_ray.pipeline.report import already_finished, finished, next_steps
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.train.checkpoint import TrainState
from tests import tiny
from tests.ran import ran
from tests.said import said

NAME = "my model"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an environment of its own, whose mlflow says what it was called with."""
    folder = tmp_path / "my project"
    scripts = folder / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "mlflow").write_text('#!/bin/sh\nprintf "%s|" "$MLFLOW_TRACKING_URI" "$@"\n')
    (scripts / "mlflow").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    return folder


def result(folder: Path) -> dict[str, Any]:
    registered = {"model": NAME, "version": 3, "alias": "candidate"}
    return {
        "mlflow": {"uri": f"sqlite:///{folder}/runs/mlflow.db", "run_id": "cafe"},
        "registered": registered,
    }


def command(lines: list[str], label: str) -> str:
    """The command behind a label."""
    [found] = [
        line.removeprefix(f"{label}: ").strip() for line in lines if line.startswith(f"{label}: ")
    ]
    return found


def output(command: str, folder: Path) -> str:
    """What a shell prints for a command, with no environment activated."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    done = ran(["bash", "-c", command], cwd=folder, env=environment)
    return done.stdout


def test_commands_work_in_any_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    lines = next_steps(result(project), None)
    store = f"sqlite:///{project}/runs/mlflow.db"
    served = output(command(lines, "serve"), tmp_path).split("|")
    assert served[:5] == [store, "models", "serve", "-m", f"models:/{NAME}@candidate"]
    assert output(command(lines, "MLflow"), tmp_path).split("|")[1:4][::2] == ["ui", store]
    challenger = {**result(project)["registered"], "alias": "challenger"}
    told = next_steps({**result(project), "registered": challenger}, None)
    assert [line.partition(":")[0] for line in told] == [
        "registered",
        "MLflow",
    ]  # the gate has not decided


def test_the_page_of_a_server_is_enough_and_an_unregistered_model_is_not_served(
    project: Path,
) -> None:
    lines = next_steps(
        {**result(project), "registered": None}, "http://mlflow:5000/#/experiments/1/runs/cafe"
    )
    assert lines == ["MLflow: http://mlflow:5000/#/experiments/1/runs/cafe"]


def test_a_finished_run_says_that_its_exports_are_others_than_the_config_asks_for(
    tmp_path: Path,
) -> None:
    config = tiny.config(run__name="mine", run__storage=str(tmp_path))
    state = tiny.claimed(config).state()
    for changes, count in (({}, 1), ({"export__rank": 16}, 2)):
        asked = tiny.config(run__name="mine", run__storage=str(tmp_path), **changes)
        with said() as lines:
            already_finished(asked, state, {"metrics": {"eval/loss": 0.5}})
        assert "run 'mine' is already finished, eval loss 0.5000" in lines[0]
        assert len(lines) == count
    assert "(export.rank was None, is 16)" in lines[1]
    assert f"delete {tmp_path}/mine/result.json and run the same command" in lines[1]


@pytest.mark.parametrize("best", [0, 2])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_end_says_that_nothing_became_better_and_that_held_out_rows_were_drawn(
    best: int, drawn: bool, tmp_path: Path
) -> None:
    held_out: Any = (
        {"data__eval": [], "data__eval_fraction": 0.1} if drawn else {"data__eval": ["other.jsonl"]}
    )
    config = tiny.config(run__storage=str(tmp_path), **held_out)
    state = TrainState(4, 1.0, best, history=[{"step": 0.0, "eval/loss": 1.0}])
    with said() as lines:
        spec: Any = SimpleNamespace(config=config)
        exported = Exported(spec, RunFolder(config.folder()), TrainResult(state=state), {})
        finished(exported, [], {**result(tmp_path), "scores": {}}, None, "no verdict")
    assert [line for line in lines if f"1.0000 after step {best}" in line]
    assert any("no step has improved the held-out loss" in line for line in lines) == (best == 0)
    assert any("ask in new words, too" in line for line in lines) == drawn


def test_of_pairs_the_end_has_the_loss_of_the_chosen_answers_and_not_the_objective(
    tmp_path: Path,
) -> None:
    config = tiny.config(run__storage=str(tmp_path), data__eval=["other.jsonl"])
    gains = {"loss": 0.5, "preferred": 0.75, "margin": 4.0, "chosen": -1.0, "rejected": -5.0}
    of_pairs = {f"eval/pairs/{name}": value for name, value in gains.items()}
    best = {"step": 4.0, "eval/objective": 0.5, "eval/loss": 2.125, **of_pairs}
    history = [{"step": 0.0, "eval/objective": 0.69, "eval/loss": 2.25}, best]
    state = TrainState(4, 0.5, 4, history=history)
    with said() as lines:
        spec: Any = SimpleNamespace(config=config)
        exported = Exported(spec, RunFolder(config.folder()), TrainResult(state=state), {})
        finished(exported, [], {**result(tmp_path), "scores": {}}, None, "no verdict")
    assert [
        line for line in lines if "2.2500 before, 2.1250 after step 4, of right answers" in line
    ]
    assert [line for line in lines if "0.75 preferred, margin +4.0 nats, log p chosen -1.0" in line]
