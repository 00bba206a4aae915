"""What searches promise, on recorded trainings of tiny models and with the scheduler that Ray Tune gets."""

import subprocess
import sys

import pytest

from tests.pipelines import project


@pytest.mark.slow
def test_a_search_finds_nearly_the_best_trial_with_a_third_of_the_compute() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/searches.py", "replay"],
        cwd=project.ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "20 searches of 16 trials" in done.stdout
    assert done.stdout.rstrip().endswith("target 95%: met")
    (default,) = [line for line in done.stdout.splitlines() if "the default" in line]
    assert float(default.split()[-6]) < 1 / 3
