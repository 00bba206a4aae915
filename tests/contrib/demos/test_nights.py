"""The ten nights, played by the command that users call."""

import os
import subprocess
import sys

import pytest

from tests.pipelines import project
from tests.recovery import hosts

COMMAND = [sys.executable, "-m", "tests.contrib.demos.nights"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(
    not hosts.possible(), reason="needs root, for a network namespace and a small disk"
)
def test_ten_nights_end_as_they_must() -> None:
    done = subprocess.run(
        COMMAND, cwd=project.ROOT, capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ten nights ended as they must")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_without_root_the_command_says_what_it_needs() -> None:
    code = "import os; from tests.contrib.demos import nights; os.setuid(65534); nights.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "nights-demo needs root" in done.stderr
