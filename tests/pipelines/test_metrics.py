"""What Prometheus sees of a training: read from the metrics endpoint of a running head."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from olora_ray.pipeline import prometheus
from tests.pipelines import project
from tests.recovery import processes
from tests.telemetry import exported

pytestmark = pytest.mark.ray
RAY = Path(sys.executable).parent / "ray"
PORT, DASHBOARD, METRICS = 26479, 28365, 28465
STEPS = 160
Series = dict[str, float]
"""Name of a series of the run -> its value; of a histogram's buckets, the one that holds all."""


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray head that exports its metrics every second, for the commands of the test; yields what marks it."""
    with processes.scratch() as folder:
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
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
        command += ['--system-config={"metrics_report_interval_ms": 1000}']
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{PORT}")
        yield folder


def scrape() -> Series:
    """What the endpoint says now about the run; empty as long as it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    found = {}
    for name, labels, value in re.findall(r"^(ray_olora_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags[prometheus.TAG] == "small" and tags.get("le", "+Inf") == "+Inf":
            found[name] = float(value)
    return found


def kill_a_worker(head: Path) -> None:
    workers = [
        one
        for one in processes.processes_of(head)
        if "RayTrainWorker" in " ".join(processes.command(one))
    ]
    assert len(workers) == 2
    workers[0].kill()


def run(file: Path, at: str, act: Callable[[], None]) -> tuple[str, list[Series]]:
    """The output of finetune.py, and what was scraped meanwhile; `act` once it has printed `at`."""
    lines: list[str] = []
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
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
        reader.start()
        seen, acted, end = [], False, time.monotonic() + 240
        while process.poll() is None:
            seen.append(scrape())
            if not acted and any(at in line for line in lines):
                acted = True
                act()
            if time.monotonic() > end:
                process.kill()
            time.sleep(0.3)
        reader.join()
    assert process.returncode == 0, "".join(lines)
    return "".join(lines), seen


@pytest.mark.slow
def test_every_metric_can_be_read_while_a_training_runs(
    head: Path, tiny_model: Path, corpus: Path
) -> None:
    tree = project.settings(
        corpus, tiny_model, train__steps=STEPS, train__eval_every=40, train__checkpoint_every=40
    )
    tree |= {"evaluation": {"samples": 0}, "registry": {}}
    output, seen = run(project.write_config(corpus, tree), " step 2/", lambda: kill_a_worker(head))
    last = {name: value for entry in seen for name, value in entry.items()}
    plain = {name for name, kind in exported().items() if kind != "histogram"}
    assert plain <= last.keys()
    assert last["ray_olora_restarts_total"] == 1
    workers = {entry.get("ray_olora_workers") for entry in seen}
    assert workers == {None, 2, 0}
    result = json.loads((corpus / "runs" / "small" / "training.json").read_text())["state"][
        "history"
    ]
    steps = [row for row in result if "train/loss" in row]
    evaluations = [row for row in result if "eval/loss" in row]
    for name, value in {
        "loss": steps[-1]["train/loss"],
        "learning_rate": steps[-1]["train/lr"],
        "data_wait_fraction": steps[-1]["data/wait_fraction"],
        "supervised_tokens_per_second": steps[-1]["train/tokens_per_second"],
        "eval_loss": evaluations[-1]["eval/loss"],
    }.items():
        assert last[f"ray_olora_{name}"] == pytest.approx(value)
    assert last["ray_olora_step_seconds_count"] >= STEPS  # those that were done again count too
    assert last["ray_olora_checkpoint_seconds_count"] >= STEPS / 40
    assert last["ray_olora_checkpoint_seconds_sum"] > 0
    assert re.search(r"died: training continues after step", output)
