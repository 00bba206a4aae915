"""What each process imports before it knows its work: an import here is paid at every start, by every process."""

import subprocess
import sys

import pytest

from tests.pipelines.project import ROOT

HEAVY = {
    "mlflow",
    "transformers",
    "datasets",
    "scipy",
    "matplotlib",
    "peft",
    "fastapi",
    "torch._dynamo",
}
PROCESSES = {
    "config and rows": (
        450,
        "olora_ray.config.command_line, olora_ray.data.detect",
        {"torch", "ray", "pandas"},
    ),
    "driver": (3000, "olora_ray.pipeline.run", set[str]()),
    "channel": (1000, "olora_ray.cluster.channel", {"torch", "pandas", "ray.train", "ray.data"}),
    "Train's controller": (
        1950,
        "olora_ray.cluster.failures, olora_ray.cluster.train_backend",
        {"torch", "ray.tune"},
    ),
    "worker": (2950, "olora_ray.cluster.worker", {"ray.tune"}),
}
"""Process -> most modules, what it imports first, and what it must not import beside HEAVY."""


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_starts_with_few_modules(process: str) -> None:
    most, first, also = PROCESSES[process]
    command = [sys.executable, "-X", "importtime", "-c", f"import {first}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = [
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    ]
    assert not (HEAVY | also) & set(imported)
    assert len(imported) < most
