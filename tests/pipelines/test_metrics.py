"""What a Prometheus that asks once a minute sees of a real training."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines import project
from tests.prometheus import MINUTE, about, prometheus
from tests.recovery import processes, runs
from tests.recovery.runs import Fault

pytestmark = pytest.mark.ray
RAY = Path(sys.executable).parent / "ray"
PORT, DASHBOARD, METRICS = 26479, 28365, 28465
PACE = 0.5
STEPS = 440
SHOWN = {"Workers A": [2], "Restarts A": [1]}


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray head as a user starts it, for the commands of the test; yields what marks it."""
    with processes.scratch() as folder:
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
            **runs.fault_points(folder, Fault(kind="watch", pace=PACE)),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        command: list[Any] = [
            RAY,
            "start",
            "--head",
            f"--port={PORT}",
            "--node-ip-address=127.0.0.1",
            "--num-cpus=2",
        ]
        command += [
            f"--dashboard-port={DASHBOARD}",
            f"--metrics-export-port={METRICS}",
            f"--temp-dir={folder}",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{PORT}")
        yield folder


def kill_a_worker(head: Path) -> None:
    workers = [
        one
        for one in processes.processes_of(head)
        if "RayTrainWorker" in " ".join(processes.command(one))
    ]
    assert len(workers) == 2
    workers[0].kill()


def run(file: Path, head: Path) -> dict[float, str]:
    """Run finetune.py, and kill a worker once; return what it printed by time."""
    lines: dict[float, str] = {}
    killed = False
    command = [sys.executable, "pipelines/finetune.py", str(file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command,
        cwd=project.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            lines[time.time()] = line
            if " step 2/" in line and not killed:
                killed = True
                kill_a_worker(head)
    assert process.returncode == 0, "".join(lines.values())
    return lines


@pytest.mark.slow
def test_every_panel_has_a_number_in_each_minute_of_a_training(
    head: Path, tiny_model: Path, corpus: Path
) -> None:
    tree = project.settings(
        corpus, tiny_model, train__steps=STEPS, train__eval_every=40, train__checkpoint_every=40
    )
    tree |= {"evaluation": {"samples": 0}, "registry": {}}
    queries = about("ray_olora")
    rates = {name: text for name, text in queries.items() if "rate(" in text}
    gauges = {name: text for name, text in queries.items() if name not in rates}
    with prometheus(head, f"127.0.0.1:{METRICS}") as server:
        lines = run(project.write_config(corpus, tree), head)
        began, ended = (
            next(at for at, line in lines.items() if f" step {step}/" in line)
            for step in (4, STEPS)
        )
        assert ended - began > 3.5 * MINUTE
        assert server.blank(gauges, began + MINUTE, ended) == []
        assert server.blank(rates, began + 2 * MINUTE, ended) == []  # from the second value on
        assert server.ask("label/run/values") == ["small"]
        shown = {name: server.numbers(queries[name], ended, ended)["small"] for name in SHOWN}
    assert shown == SHOWN
    assert re.search(r"died: training continues after step", "".join(lines.values()))
