"""What crosses a limited link between two pretended machines."""

import re
import subprocess
import sys
from typing import Any

import pytest

from tests.pipelines import project


@pytest.mark.slow
def test_a_machine_sends_one_vector_per_step(benchmark: Any) -> None:
    if problem := benchmark("exchange").missing():
        pytest.skip(problem)
    command = [sys.executable, str(project.ROOT / "benchmarks" / "exchange.py")]
    command += ["--workers", "2", "--megabytes", "1", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # another code if the bits differ
    vectors = [
        float(found) for found in re.findall(r"(?:first|flat) +[\d.]+ +([\d.]+)", done.stdout)
    ]
    assert vectors == pytest.approx([1.0, 2.0], rel=0.05)
