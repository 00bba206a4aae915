"""A search through its entry script, with real Ray Tune, real trainings and MLflow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from olora_ray.config.load import flatten, load_config
from tests.pipelines import project
from tests.ran import ran
from tests.recovery import processes

pytestmark = pytest.mark.ray
SCRIPT = str(project.ROOT / "pipelines" / "sweep.py")
SPACE: dict[str, Any] = {
    "search": {
        "adapter.rank": {"grid": [2, 4]},
        "adapter.alpha": {"of": "adapter.rank", "times": 2},
        "train.lr": {"grid": [1e-2, 1e-3, 2e9]},
    },
    "searcher": "grid",
    "scheduler": {"kind": "asha", "reduction": 2},
    "trials_per_worker": 4,
}
SHORT = {
    "cluster__workers": 1,
    "cluster__cpus_per_worker": 1,  # two shared bases take all of a small machine
    "train__steps": 12,
    "train__eval_every": 3,
    "train__checkpoint_every": 3,
    "evaluation__scorer": None,
    "evaluation__samples": 0,
}


def write(folder: Path, model: Path, space: dict[str, Any], **changes: Any) -> list[str]:
    """The arguments of a search."""
    config = project.write_config(folder, project.settings(folder, model, **{**SHORT, **changes}))
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space))
    return [str(config), str(file)]


def sweep(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return ran(
        [sys.executable, SCRIPT, *arguments],
        code=None,
        cwd=project.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished search with stopped and failed trials: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("searched")
    project.make_rows(folder)
    done = sweep(*write(folder, tiny_model, SPACE), "--register")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "small-space", done.stdout


def records(folder: Path) -> dict[int, dict[str, Any]]:
    found = json.loads((folder / "leaderboard.json").read_text())
    return {trial["number"]: trial for trial in found["trials"]}


def test_a_search_leaves_what_the_docs_promise(searched: tuple[Path, str]) -> None:
    folder, _ = searched
    for name in (
        "best.yaml",
        "leaderboard.json",
        "report.html",
        "shared/olora/factors.safetensors",
        "progress.json",
    ):
        assert (folder / name).is_file()
    found = records(folder)
    assert sorted(found) == list(range(7))
    assert len(list((folder / "trials").iterdir())) == 7
    best = min(
        (trial for trial in found.values() if trial["value"] is not None),
        key=lambda trial: trial["value"],
    )
    values = flatten(load_config(folder / "best.yaml"))
    assert {field: values[field] for field in best["params"]} == best["params"]
    assert (folder / "trials" / f"trial-{best['number']:03d}" / "export" / "parity.json").is_file()
    table = (
        (folder / "tune" / f"trial-{best['number']:03d}" / "progress.csv").read_text().splitlines()
    )
    assert {"step", "train/loss", "train/lr", "eval/loss", "eval/perplexity"} <= set(
        table[0].split(",")
    )


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 8])
def test_sixteen_trials_with_pairs_share_one_pass_for_the_reference(
    tiny_model: Path, tmp_path: Path, together: int
) -> None:
    project.make_rows(tmp_path)
    project.make_pairs(tmp_path / "pairs.jsonl", 30)
    project.make_pairs(tmp_path / "eval-pairs.jsonl", 5, first=100)
    space = {
        "search": {"train.lr": {"loguniform": [1e-4, 1e-2]}, "adapter.rank": {"choice": [2, 4]}},
        "scheduler": {"reduction": 2},
        "trials_per_worker": together,
    }
    given = write(tmp_path, tiny_model, space, data=project.with_pairs(tmp_path), train__steps=6)
    done = sweep(*given, "--register")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "small-space"
    logs = [file.read_text() for file in folder.glob("trials/*/log.txt")]
    assert len(logs) == 16
    assert not any("measuring the losses before the first step" in log for log in logs)
    files = [*(tmp_path / "runs" / "tokens").rglob("reference-*.json")]
    assert len(files) == 2  # training and held-out rows
    assert json.loads((folder / "leaderboard.json").read_text())["metric"] == "eval/objective"
    assert "registered: small version 1" in done.stdout


def test_a_trial_that_fails_has_its_reason_and_the_search_resumes(
    searched: tuple[Path, str],
) -> None:
    folder, log = searched
    failed = [trial for trial in records(folder).values() if trial["status"] == "failed"]
    assert {trial["params"]["train.lr"] for trial in failed} == {2e9}
    assert all("not finite" in trial["reason"] for trial in failed)
    assert "Traceback" not in log
    others = [trial for trial in records(folder).values() if trial["params"]["train.lr"] != 2e9]
    assert {trial["status"] for trial in others} <= {"finished", "stopped"}
    assert all(trial["value"] is not None for trial in others)


def test_mlflow_has_a_parent_with_a_child_per_trial_and_the_best_is_registered(
    searched: tuple[Path, str],
) -> None:
    from mlflow import MlflowClient

    folder, _ = searched
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("olora").experiment_id])
    parents = [run for run in runs if run.data.tags.get("olora.kind") == "search"]
    assert [run.info.status for run in parents] == ["FINISHED"]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id
    ]
    assert len(children) == len(runs) - 1 == 7
    names = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert names >= {"report.html", "best.yaml", "leaderboard.json"}
    version = client.get_model_version_by_alias("small", "candidate")
    best = min(
        (t for t in records(folder).values() if t["value"] is not None), key=lambda t: t["value"]
    )
    assert version.run_id == best["mlflow_run"]


def test_the_trials_share_what_is_the_same_for_all(searched: tuple[Path, str]) -> None:
    folder, log = searched
    assert "olora factors at rank 4" in log
    texts = [
        (folder / "trials" / f"trial-{number:03d}" / "log.txt").read_text() for number in range(7)
    ]
    assert all("factors read from the search" in text for text in texts)
    assert not any("initialisation" in text for text in texts)
    starts = {trial["curve"][0][1] for trial in records(folder).values() if trial["curve"]}
    assert len(starts) == 1  # the base was measured once


@pytest.mark.slow
def test_the_best_of_trials_with_tokens_of_their_own_is_registered(
    corpus: Path, tiny_model: Path
) -> None:
    """The search itself has other tokens than any of its trials."""
    space = {
        "search": {"data.max_length": {"grid": [48, 64]}},
        "searcher": "grid",
        "scheduler": {"kind": "none"},
    }
    done = sweep(*write(corpus, tiny_model, space, data__max_length=96), "--register")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"registered: small version 1 .*, trial [01]$", done.stdout, re.MULTILINE)


def trials(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> what the trial itself has written down, while the search runs."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in folder.glob("trials/*/trial.json")
    }


@pytest.fixture
def scratch() -> Iterator[Path]:
    with processes.scratch() as folder:
        yield folder


WATCHED = """
import json, runpy, sys, time
import ray
from ray.util import placement_group_table

leave = ray.shutdown

def told(*arguments, **named):
    if ray.is_initialized():
        end = time.monotonic() + 20  # an ended process gives back what it held a moment later
        while (free := ray.available_resources()).get("CPU") != ray.cluster_resources()["CPU"]:
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        groups = [group["state"] for group in placement_group_table().values()]
        print("AT THE END", json.dumps([ray.cluster_resources()["CPU"], free.get("CPU"), groups]), flush=True)
    leave(*arguments, **named)

ray.shutdown = told
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs an entry script, and says before Ray is shut down what is still taken."""


@pytest.mark.slow
def test_stopped_trials_give_back_everything(corpus: Path, tiny_model: Path) -> None:
    """Trials with workers of their own: ASHA stops some while others wait for their place."""
    space = {
        "search": {"train.lr": {"grid": [1e-2, 1e-6, 1e-3, 1e-7, 2e9, 3e-3]}},
        "searcher": "grid",
        "scheduler": {"kind": "asha", "reduction": 2},
        "concurrency": 2,
    }
    # Long enough that Tune can stop a trial before it has ended by itself, on a busy machine too.
    long = {"train__steps": 120, "train__eval_every": 10, "train__checkpoint_every": 40}
    command = [sys.executable, "-c", WATCHED, SCRIPT, *write(corpus, tiny_model, space, **long)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = ran(command, cwd=project.ROOT, env=environment)
    found = records(corpus / "runs" / "small-space")
    assert sorted(found) == list(range(7))
    statuses = [found[number]["status"] for number in range(7)]
    assert "stopped" in statuses[:5]  # and those after it got its place
    assert statuses.count("failed") == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("AT THE END ")]
    whole, free, groups = json.loads(line.removeprefix("AT THE END "))
    assert free == whole
    assert groups
    assert set(groups) == {"REMOVED"}


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGKILL of everything", "SIGINT, then it is moved"])
def test_a_search_whose_driver_is_killed_resumes(
    corpus: Path, tiny_model: Path, scratch: Path, end: str
) -> None:
    """It ends in the middle; the same command ends with the same trials, finished ones as they were."""
    space = {**SPACE, "scheduler": {"kind": "none"}, "concurrency": 2, "trials_per_worker": 2}
    arguments = write(
        corpus,
        tiny_model,
        space,
        train__steps=240,
        train__eval_every=10,
        train__checkpoint_every=10,
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(scratch),
        "TMPDIR": str(scratch),
    }
    command = [sys.executable, SCRIPT, *arguments]
    with subprocess.Popen(
        command,
        cwd=project.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        for line in driver.stdout:
            if "2 of 7 trials have ended" in line:
                break
        seen = time.monotonic()
        second = sweep(*arguments)
        assert second.returncode == 75, second.stdout + second.stderr
        assert second.stderr.startswith(
            "error: run.name: 'small-space' is already running (process "
        )
        time.sleep(max(0.0, 12 - (time.monotonic() - seen)))  # Tune writes its state every 10 s
        folder = corpus / "runs" / "small-space"
        while not any(
            trial["status"] == "unfinished" and trial["step"] for trial in trials(folder).values()
        ):
            assert driver.poll() is None, "the search has ended before it could be interrupted"
            time.sleep(0.1)
        if end.startswith("SIGINT"):
            driver.send_signal(signal.SIGINT)
            assert driver.wait(60) == 130
        else:
            os.killpg(driver.pid, signal.SIGSTOP)
            processes.kill_all(scratch)
    if end.endswith("moved"):
        (corpus / "runs").rename(corpus / "elsewhere")
        folder = corpus / "elsewhere" / "small-space"
        arguments.append(f"run.storage={corpus / 'elsewhere'}")
    before = trials(folder)
    assert all(
        "not finite" in trial["reason"] for trial in before.values() if trial["status"] == "failed"
    )
    ended = {
        name: trial for name, trial in before.items() if trial["status"] in ("finished", "failed")
    }
    assert 2 <= len(ended) < 7
    again = sweep(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    found = {f"trial-{number:03d}": trial for number, trial in records(folder).items()}
    assert sorted(found) == [f"trial-{number:03d}" for number in range(7)]
    assert {trial["status"] for trial in found.values()} <= {"finished", "failed"}, again.stdout
    for name, trial in ended.items():
        assert found[name]["curve"] == trial["curve"]
        assert found[name]["params"] == trial["params"]
    assert "its process died" not in again.stdout
    assert (corpus / "runs").exists() == (not end.endswith("moved"))
    finished = [trial for trial in found.values() if trial["status"] == "finished"]
    assert all(
        [step for step, _ in trial["curve"]] == list(range(0, 241, 10)) for trial in finished
    )


@pytest.mark.slow
def test_trials_continue_when_the_process_they_share_is_killed(
    corpus: Path, tiny_model: Path, scratch: Path
) -> None:
    space = {
        "search": {"train.lr": {"grid": [1e-2, 3e-3, 1e-3]}},
        "searcher": "grid",
        "scheduler": {"kind": "none"},
        "trials_per_worker": 4,
        "concurrency": 4,
    }
    arguments = write(
        corpus,
        tiny_model,
        space,
        train__steps=200,
        train__eval_every=20,
        train__checkpoint_every=20,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(scratch)}
    with subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        cwd=project.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        killed = 0
        for line in driver.stdout:
            if "step 40/200" in line and not killed:
                found = processes.processes_of(scratch)
                shared = [one for one in found if one.name().startswith("ray::SharedBase")]
                killed = len(shared)
                for one in shared:
                    one.kill()
    assert killed == 1
    assert driver.returncode == 0
    folder = corpus / "runs" / "small-space"
    found = records(folder)
    assert [found[number]["status"] for number in range(4)] == ["finished"] * 4
    texts = [
        (folder / "trials" / f"trial-{number:03d}" / "log.txt").read_text() for number in range(4)
    ]
    assert all(
        "the process that several trials share died: training continues after step" in text
        for text in texts
    )
    assert all(
        [step for step, _ in found[number]["curve"]] == list(range(0, 201, 20))
        for number in range(4)
    )
