"""The GPU kit on a CPU; on a GPU the same code runs with other sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.device import gpu
from tests.pipelines import project
from tests.waiting import until

pytestmark = pytest.mark.slow  # in make test: tests/device, and test_parts.py
KIT = [sys.executable, str(project.ROOT / "benchmarks" / "gpu.py")]
ON_CPU = ["--size", "tiny", "--device", "cpu"]
BUDGET = 540.0
CHECKS = ("checks", "codes", "heads", "twice", "elsewhere", "folder", "alone")
WITHOUT = "import sys\nfor name in ('ray', 'mlflow'): sys.modules[name] = None\n"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def called(
    kit: list[str], out: Path, env: dict[str, str] | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Call a command until all its jobs have run, each call within its budget; return the last call and its results."""
    for _ in range(5):  # on a busy machine the budget ends some
        began = time.monotonic()
        kit_with = [*kit, "--out", str(out), "--budget", str(BUDGET)]
        done = subprocess.run(kit_with, capture_output=True, text=True, env=env)
        assert time.monotonic() - began < BUDGET
        if not ("\nnot run: " in done.stdout or "at the end of the budget" in done.stdout):
            return done, [*{json.dumps(line["job"]): line for line in lines(out)}.values()]
    raise AssertionError(done.stdout)


@pytest.mark.parametrize("command", ["right", "fast", "sizes"])
def test_each_command_runs_on_a_cpu(command: str, tmp_path: Path) -> None:
    kit, out = [*KIT, command, *ON_CPU], tmp_path / "gpu.jsonl"
    done, found = called(kit, out)
    assert [line for line in found if "failed" in line] == []
    assert done.returncode == 0, done.stdout
    for line in found:
        if line["job"]["kind"] == "ours":
            assert 0 < line["found"]["planned GiB"] < 1
    kept = out.read_text()
    again, _ = called(kit, out)
    assert again.returncode == 0
    assert out.read_text() == kept  # nothing is missing


def test_what_has_ended_is_kept_when_the_command_is_killed_and_the_rest_is_named(
    tmp_path: Path,
) -> None:
    out = tmp_path / "gpu.jsonl"
    with subprocess.Popen(
        [*KIT, "fast", *ON_CPU, "--out", str(out)], stdout=subprocess.DEVNULL
    ) as killed:
        until(lambda: out.exists() and out.read_text(), seconds=300)
        until(psutil.Process(killed.pid).children, seconds=60)
        jobs = psutil.Process(killed.pid).children()
        killed.kill()
    assert psutil.wait_procs(jobs, timeout=3)[1] == []  # no job is left that holds the GPU
    kept = lines(out)
    assert kept[0]["found"]["name"] == "CPU"
    done = subprocess.run(
        [*KIT, "fast", *ON_CPU, "--out", str(out), "--budget", "1"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "not run: ours, tiny: 2 x 64 tokens, " in done.stdout
    assert lines(out) == kept


LACKING = {
    "NCCL": "Distributed package doesn't have NCCL",
    "a profile of kernels": "Legacy CUDA profiling",
    "a kernel that TRL uses": "Could not run 'aten::addmm.dtype_out'",
    "a compiler of kernels": "BackendCompilerFailed: backend='inductor'",
}
"""What the test device lacks -> part of the error of a job that needs it."""
START = f"""
import sys
sys.path.append({str(project.ROOT)!r})
from tests.device import gpu
gpu.load()
"""


@pytest.fixture
def on_device(tmp_path: Path) -> dict[str, str]:
    """The environment in which each Python process, those of the kit's jobs too, has the test device."""
    if gpu.missing():
        pytest.skip(str(gpu.missing()))
    gpu.build()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(START)
    return os.environ | {"PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["right", "fast", "sizes"])
def test_each_command_runs_on_the_test_device(
    command: str, on_device: dict[str, str], tmp_path: Path
) -> None:
    kit, out = [*KIT, command, "--size", "tiny"], tmp_path / "gpu.jsonl"
    with subprocess.Popen(
        [*kit, "--out", str(out)], stdout=subprocess.DEVNULL, env=on_device
    ) as killed:
        until(lambda: out.exists() and len(out.read_text().splitlines()) == 2, seconds=1200)
        killed.kill()
    kept = out.read_text()
    _, found = called(kit, out, on_device)
    assert out.read_text().startswith(kept)
    failures = [line["failed"] + line["stderr"] for line in found if "failed" in line]
    checks = [
        check
        for line in found
        if line["job"]["kind"] in CHECKS
        for check in line.get("found", {}).values()
    ]
    failures += [check.get("failed", str(check)) for check in checks if not check["ok"]]
    assert [each for each in failures if not any(part in each for part in LACKING.values())] == []


@pytest.mark.parametrize("kind", ["checks", "codes", "twice", "elsewhere", "alone"])
def test_a_check_holds_without_ray(kind: str) -> None:
    """In a process as on the machine with the GPU: the project is not installed, Ray and MLflow are missing."""
    job = json.dumps({"kind": kind, "device": "cpu", "dtype": "bfloat16", "rank": 16})
    code = f"{WITHOUT}import gpu\ngpu.main(['--job', {job!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, check in found.items() if not check["ok"]] == []


def test_a_check_that_fails_or_does_not_run_fails_the_kit(benchmark: Any) -> None:
    module = benchmark("gpu")
    job = {"kind": "checks"}
    assert module.right({"job": job, "found": {"a": {"ok": True}}})
    assert not module.right({"job": job, "found": {"a": {"ok": True}, "b": {"ok": False}}})
    assert not module.right({"job": job, "failed": "died"})
