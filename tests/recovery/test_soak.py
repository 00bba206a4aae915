"""A few minutes of the soak : whatever happens on two hosts, the run ends as if nothing had."""

import os
from pathlib import Path

import pytest

from tests.recovery import hosts, soak

MINUTES = 5.0


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_to_which_something_happens_all_the_time(
    tiny_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0 or not hosts.possible():
        pytest.skip("needs root and network namespaces")
    report = soak.soak(tiny_project, tmp_path, MINUTES, 1, soak.timed(print))
    with capsys.disabled():
        print(f"\n{report.text()}")
    assert not report.problems, report.text()
    assert sum(cost.times for cost in report.costs.values()) >= 3
