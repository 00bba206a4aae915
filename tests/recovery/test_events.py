"""The parts of the soak that need no cluster: what is drawn, what it has cost, and the command that is given again."""

import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from olora_ray.config.load import load_config
from tests.recovery import disturbances, moments, processes, runs, soak, tally
from tests.recovery.cluster import Cluster
from tests.recovery.disturbances import Disturbances
from tests.recovery.events import GAP, KINDS, Event, events
from tests.recovery.moments import Done
from tests.recovery.runs import Fault, Run
from tests.recovery.tally import Cost, Happened


def test_events_follow_from_the_seed() -> None:
    drawn = list(islice(events(1), 90))
    assert drawn == list(islice(events(1), 90))
    assert drawn != list(islice(events(2), 90))
    assert Counter(event.what for event in drawn) == dict.fromkeys(KINDS, 10)
    assert all(GAP[0] <= event.gap <= GAP[1] for event in drawn)
    assert all(KINDS[event.what][0] <= event.seconds <= KINDS[event.what][1] for event in drawn)
    assert {event.of(2) for event in drawn} == {0, 1}


def test_the_config_is_one_that_the_product_takes(tmp_path: Path) -> None:
    config = load_config(runs.written(tmp_path, tmp_path, **soak.SCHEDULE))
    assert (config.cluster.workers, config.cluster.max_failures, config.train.global_batch) == ((1, 2), -1, 8)


def done(*when: tuple[int, float]) -> list[Done]:
    return [Done(f"step {step}", at, 1) for step, at in when]


KILL, CUT = Happened("SIGKILL of a worker", 13.5), Happened("link cut", 20.5)


def test_pauses_and_steps_done_again_go_to_what_has_caused_them() -> None:
    lines = done((1, 10), (2, 11), (3, 12), (4, 13), (4, 18), (5, 19), (6, 20), (7, 30), (8, 31), (9, 35), (10, 36))
    late = Happened("SIGTERM of the driver", 21.5)
    assert tally.tally([KILL, CUT, late, Happened("link cut", 50)], lines) == {
        "SIGKILL of a worker": Cost(times=1, again=1, pauses=[6], lost=5),
        "link cut": Cost(times=2, again=0, pauses=[10], lost=9),
        "SIGTERM of the driver": Cost(times=1, again=0, pauses=[4], lost=3),
    }


def test_what_comes_before_any_event_is_nobodys() -> None:
    lines = done((1, 1), (2, 2), (3, 3), (3, 4), (4, 9), (5, 10))
    assert tally.tally([CUT], lines) == {
        "link cut": Cost(times=1),
        tally.NOTHING: Cost(times=0, again=1, pauses=[6], lost=5),
    }


STEPS = 40
PROGRAM = """
import pathlib, sys
from olora_ray.common.fault_points import reached
broken = pathlib.Path(sys.argv[2], "broken")
for step in range(int(sys.argv[1]), 41):
    reached("step", step, 0)
    if step > 30 and broken.exists():
        broken.unlink()
        sys.exit("error: broken")
"""


@dataclass
class StandIn(Run):
    """A program that does steps, and resumes one step earlier than it was; it fails once where `broken` lies."""

    title: str = ""
    """By which it may be taken for another process."""

    def start(self) -> None:
        self.attempts += 1
        first = max([0, *(one.step for one in moments.read(self.folder))]) or 1
        with self._file("out").open("wb") as out, self._file("err").open("wb") as err:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(first), str(self.folder), self.title],
                env=runs.environment(self.folder, self.fault),
                stdout=out,
                stderr=err,
            )


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbances, "LOOK", 0.1)


def on_no_hosts(run: Run) -> Disturbances:
    nobody: Any = None
    hosts: Any = ()
    return Disturbances(Cluster(nobody, hosts, run), lambda text: None)


@pytest.mark.ray
def test_the_command_is_given_until_its_work_is_done() -> None:
    drawn = [Event(f"{signal} of the driver", 0.3, 0, 0) for signal in ("SIGKILL", "SIGTERM")]
    with processes.scratch() as folder:
        (folder / "broken").touch()
        run = StandIn(Path(), folder, Fault(pace=0.3))
        found = on_no_hosts(run)
        found.begin()
        found.go_on(iter([*drawn, Event("SIGSTOP of a worker", 0, 30, 0)]), 100)
        found.finish(60)
        lines = moments.read(folder)
    assert found.over
    assert [one.what for one in found.happened] == [event.what for event in drawn]  # there was no worker to stop
    assert run.attempts == 4
    assert found.problems == ["attempt 3 has ended with 1: error: broken"]
    further, _ = moments.split(lines)
    assert [one.step for one in further] == list(range(1, STEPS + 1))
    assert tally.tally(found.happened, lines)["SIGTERM of the driver"].again >= 1


@pytest.mark.ray
def test_what_is_done_to_a_worker_reaches_it() -> None:
    drawn = [
        Event("SIGSTOP of a worker", 0.5, 3.0, 0),
        Event("SIGKILL of a worker", 1, 0, 0),
        Event("exception in a worker", 1, 0, 0),
    ]
    with processes.scratch() as folder:
        run = StandIn(Path(), folder, Fault(pace=0.2), title="ray::RayTrainWorker")
        found = on_no_hosts(run)
        found.begin()
        found.go_on(iter(drawn), 100)
        found.finish(60)
        costs = tally.tally(found.happened, moments.read(folder))
    assert [one.what for one in found.happened] == [event.what for event in drawn]
    assert max(costs["SIGSTOP of a worker"].pauses) >= 3.0
    first, second = found.problems  # of a command that is a worker
    assert first == "attempt 1 has ended with -9: nothing was printed"
    assert second == "attempt 2 has ended with 1: RuntimeError: injected"


@pytest.mark.ray
def test_a_run_that_stands_still_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbances, "STALL", 1.0)
    with processes.scratch() as folder:
        run = StandIn(Path(), folder, Fault(pace=0.1))
        found = on_no_hosts(run)
        run.start()
        assert run.driver is not None
        run.driver.send_signal(signal.SIGSTOP)
        with pytest.raises(AssertionError, match="no step for 1 s"):
            found.watch(60)
