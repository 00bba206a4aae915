"""`make serving-demo` misses none of its goals."""

import subprocess
import sys

import pytest

from tests.pipelines.project import ROOT


@pytest.mark.slow
def test_the_port_keeps_all_goals_of_the_demo() -> None:
    command = [sys.executable, "-m", "tests.serving.demo"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
