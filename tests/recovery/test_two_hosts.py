"""Hosts that die, lose their link, join and are taken away while a run trains on them."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.recovery import cluster as clusters
from tests.recovery import hosts, runs
from tests.recovery.cluster import Cluster
from tests.recovery.hosts import Host
from tests.recovery.runs import EndState, Fault

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 60
SCHEDULE: dict[str, Any] = {
    "train__steps": STEPS,
    "train__checkpoint_every": 5,
    "train__eval_every": 20,
    "train__lr": 1e-3,
}
MIDDLE = Fault("step", "hold", step=32, rank=1)
PACED = Fault(pace=0.5)
CUT_SECONDS = 20.0
NOTICE_SECONDS = 20


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    if os.geteuid() != 0 or not hosts.possible():
        pytest.skip("needs root and network namespaces")


@pytest.fixture(scope="module")
def clean(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> EndState:
    """On one host, with two workers."""
    return runs.run_clean(tiny_project, tmp_path_factory.mktemp("clean"), **SCHEDULE)


def cluster(
    tiny_project: Path, folder: Path, fault: Fault, others: int, **changes: Any
) -> contextlib.AbstractContextManager[Cluster]:
    """A cluster of which so many others than the head have Ray; a worker takes one's only CPU."""
    config = runs.written(tiny_project, folder, **SCHEDULE, cluster__cpus_per_worker=1, **changes)
    return clusters.cluster(config, fault, others)


def finish(found: Cluster, folder: Path, clean: EndState) -> None:
    """Wait for the run's end, and check all: another number of workers changes nothing, either."""
    assert found.run.wait() == 0, found.run.tail()
    end = runs.end_state(folder)
    assert found.run.initialised() == 1, found.run.tail()
    assert runs.differences(end, clean) == [], found.run.tail()


def test_a_run_goes_on_when_the_link_of_a_host_is_cut(
    clean: EndState, tiny_project: Path, tmp_path: Path
) -> None:
    with cluster(tiny_project, tmp_path, MIDDLE, others=2, cluster__workers=2) as found:
        found.run.start()
        host = found.host_of(found.run.wait_for_fault()["pid"])
        host.link("down")
        found.run.release()
        time.sleep(CUT_SECONDS)
        host.link("up")
        found.run.wait_until(lambda: ended_or_revived(found, host), "the run does not end")
        finish(found, tmp_path, clean)
        assert found.run.resumptions(), found.run.tail()


def ended_or_revived(found: Cluster, host: Host) -> bool:
    """Whether the run has ended; a node that Ray gave up while its link was down is started again."""
    if found.run.driver.poll() is not None:
        return True
    found.revive(host)
    return False


def test_a_run_grows_when_a_host_joins(clean: EndState, tiny_project: Path, tmp_path: Path) -> None:
    elastic = {"cluster__workers": [1, 2]}
    with cluster(tiny_project, tmp_path, Fault(pace=1.5), others=1, **elastic) as found:
        found.run.start()
        found.wait_for_step(4)
        found.others[1].start_ray()
        finish(found, tmp_path, clean)
        assert [one.workers for one in found.run.resumptions()] == [2], found.run.tail()


def test_no_step_is_lost_when_a_host_is_taken_away_with_notice(
    clean: EndState, tiny_project: Path, tmp_path: Path
) -> None:
    patient = {"cluster__workers": [1, 2], "cluster__max_failures": 0}
    with cluster(tiny_project, tmp_path, PACED, others=2, **patient) as found:
        found.run.start()
        found.wait_for_step(12)
        found.drain(found.others[1], NOTICE_SECONDS)
        time.sleep(NOTICE_SECONDS)
        found.others[1].kill()
        finish(found, tmp_path, clean)
        assert [(one.workers, one.again) for one in found.run.resumptions()] == [(1, 0)], (
            found.run.tail()
        )
