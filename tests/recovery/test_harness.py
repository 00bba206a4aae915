"""The harness itself: a difference is noticed, a fault reaches the process it is meant for, nothing stays behind."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.recovery import processes, runs
from tests.recovery.runs import EndState, Fault
from tests.waiting import until

END = EndState(
    adapter=b"weights",
    others={"optimizer.safetensors": b"moments"},
    statuses=("FINISHED",),
    series={"eval/loss": ((0, 2.0), (4, 1.0), (8, 0.5))},
    versions=(1,),
    result={
        "steps": 8,
        "registered": {"version": 1},
        "metrics": {"eval/loss": 0.5, "seconds": 9.0},
    },
)


TWICE = ((0, 2.0), (4, 1.0), (4, 1.0), (8, 0.5))
OTHER = ((0, 2.0), (4, 1.0), (8, 0.6))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"adapter": b"weighus"}, "the adapter has other bytes"),
        ({"others": {"optimizer.safetensors": b"momenta"}}, "['optimizer.safetensors'] have"),
        ({"statuses": ("FINISHED", "FAILED")}, "MLflow runs: "),
        ({"versions": (2, 1)}, "registered versions: "),
        ({"series": END.series | {"eval/loss": TWICE}}, "eval/loss: "),
        ({"series": END.series | {"eval/loss": OTHER}}, "eval/loss: "),
    ],
)
def test_a_difference_is_noticed(change: dict[str, Any], problem: str) -> None:
    [line] = runs.differences(dataclasses.replace(END, **change), END)
    assert line.startswith(problem)


SAVES = """
import os, pathlib, sys
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
folder = pathlib.Path(sys.argv[1])
for step in (3, 6):
    checkpoint.save(folder / str(step), {}, None, {}, TrainState(step=step), {}, "")
"""


def python(
    folder: Path, fault: Fault, code: str, *arguments: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=runs.environment(folder, fault),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_process_dies_once_and_where_it_was_meant_to(tmp_path: Path) -> None:
    fault = Fault("checkpoint", "kill", step=6)
    first = python(tmp_path, fault, SAVES, tmp_path / "first")
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert (tmp_path / "first" / "3" / "manifest.json").exists()
    assert [file.name for file in (tmp_path / "first" / "6").iterdir()] == ["adapter.safetensors"]
    second = python(tmp_path, fault, SAVES, tmp_path / "second")
    assert second.returncode == 0, second.stderr
    assert not (tmp_path / "missing").exists()


def test_a_point_that_the_product_no_longer_has_is_told(tmp_path: Path) -> None:
    code = "import olora_fault_points as p, types; p._replace(types.ModuleType('m'), 'gone', lambda old: old)"
    assert python(tmp_path, Fault(), code).returncode == 0
    assert (tmp_path / "missing").read_text() == "m.gone"


def test_nothing_is_left_of_a_run_that_is_given_up() -> None:
    with processes.scratch() as folder:
        sleep = [
            sys.executable,
            "-c",
            "import subprocess, time; subprocess.Popen(['sleep', '99']); time.sleep(99)",
        ]
        parent = subprocess.Popen(sleep, env=runs.environment(folder, Fault()))
        until(lambda: len(processes.processes_of(folder)) == 2, 20)
        found = processes.processes_of(folder)
        assert parent.pid in {process.pid for process in found}
    assert parent.wait(10) == -signal.SIGKILL
    assert not any(
        processes.is_alive(process) for process in found if psutil.pid_exists(process.pid)
    )
    assert not folder.exists()
