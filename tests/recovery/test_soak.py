"""A few minutes of the soak: whatever happens on two hosts, the run ends as if nothing had."""

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.recovery import hosts, runs
from tests.recovery.cluster import cluster
from tests.recovery.disturbances import Disturbances
from tests.recovery.events import events
from tests.recovery.runs import Fault

SECONDS = 300
PACE = 0.5
"""Seconds that every step takes longer: there are not so many then, and as many faults meet a worker that computes."""
STEPS = math.ceil(SECONDS / PACE)
"""At least as many as there is time for."""
LIMIT = runs.ATTEMPT_SECONDS + STEPS
"""Of seconds, where nobody draws out the steps, on a machine that has other things to do."""
SCHEDULE: dict[str, Any] = {
    "train__steps": STEPS,
    "train__global_batch": 8,
    "train__checkpoint_every": 10,
    "train__eval_every": 50,
    "train__lr": 1e-3,
    "cluster__workers": [1, 2],
    "cluster__cpus_per_worker": 1,
    "cluster__max_failures": -1,
}


def say(text: str) -> None:
    """Print with the time of day, as the run's own log has it."""
    print(time.strftime("%H:%M:%S"), text)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_to_which_something_happens_all_the_time(tiny_project: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not hosts.possible():
        pytest.skip("needs root and network namespaces")
    for name in ("untouched", "soaked"):
        (tmp_path / name).mkdir()
    clean = runs.run_clean(tiny_project, tmp_path / "untouched", LIMIT, **SCHEDULE)
    config = runs.written(tiny_project, tmp_path / "soaked", **SCHEDULE)
    with cluster(config, Fault(pace=PACE)) as found:
        soaked = Disturbances(found, say)
        soaked.begin()
        soaked.go_on(events(seed=1), SECONDS)
        soaked.finish(LIMIT)
        assert soaked.problems == []
        assert found.run.initialised() == 1
        assert not (found.run.folder / "missing").exists(), found.run.tail()
    assert runs.differences(runs.end_state(tmp_path / "soaked"), clean) == []
    assert len(soaked.happened) >= 3
