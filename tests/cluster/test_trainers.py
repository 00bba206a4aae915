"""The driver's side of the membership: when an attempt has ended, that its trainers do, and workers that hang."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import make_channel
from olora_ray.cluster.membership import driver
from olora_ray.cluster.membership.driver import Trainers, WorkerGroup, end_hung, given, in_place, kill_worker
from olora_ray.cluster.membership.state import Member
from olora_ray.cluster.spec import LEFT, TrainResult
from olora_ray.common.errors import TryAgain
from tests import tiny
from tests.said import said
from tests.waiting import until


class Fit:
    """Trainers that end when they are told."""

    def __init__(self) -> None:
        self.groups: list[WorkerGroup] = []
        self.ends: list[threading.Event] = []
        self.results: list[Any] = []
        self.asked: list[Any] = []
        remote = SimpleNamespace(remote=self.asked.append)
        self.channel = SimpleNamespace(want=remote, request_stop=remote)

    def __call__(self, group: WorkerGroup) -> TrainResult:
        number = len(self.groups)
        self.groups.append(group)
        self.ends.append(threading.Event())
        self.ends[number].wait(30)
        result = self.results[number]
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, TrainResult)
        return result

    def end(self, number: int, result: Any) -> None:
        self.results += [None] * (number + 1 - len(self.results))
        self.results[number] = result
        self.ends[number].set()


@pytest.fixture
def fit() -> Fit:
    return Fit()


def started(fit: Fit, count: int) -> None:
    while len(fit.ends) < count:
        threading.Event().wait(0.01)


@pytest.mark.lengthy
def test_it_ends_with_what_the_first_returns_or_raises(fit: Fit) -> None:
    found = Trainers(fit, fit.channel, 1, 2)
    assert not found.ended(None)
    fit.end(0, TrainResult(problem="x"))
    assert found.ended(None)
    assert found.result().problem == "x"
    other = Trainers(fit, fit.channel, 2, 2)
    started(fit, 2)
    fit.end(1, RuntimeError("broken"))
    while not other.ended(None):
        pass
    with pytest.raises(RuntimeError, match="broken"):
        other.result()


@pytest.mark.lengthy
def test_others_train_on_when_the_first_ones_workers_have_left(fit: Fit) -> None:
    found = Trainers(fit, fit.channel, 3, 1)
    started(fit, 1)
    found.add(2)
    found.stand_by(1)
    started(fit, 3)
    assert sorted(fit.groups, key=lambda group: group.first_rank) == [
        WorkerGroup(1, 3),
        WorkerGroup(2, 3, 1),
        WorkerGroup(1, 3, 3, spare=True),
    ]
    assert (found.workers, fit.asked) == (3, [2])
    fit.end(0, TrainResult(interrupted=LEFT))
    for _ in range(3):
        assert not found.ended(None)
    assert found.ended(TrainResult())
    for number in (1, 2):
        fit.end(number, TrainResult(interrupted=LEFT))
    found.end()
    assert found.ended(None)


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("end", "failures", "told"),
    [
        (RuntimeError("broken"), 1, ["warning: 2 workers will not come back: broken"]),
        (TrainResult(interrupted=LEFT), 0, []),
    ],
)
def test_workers_that_joined_and_have_ended_make_room_for_others(
    fit: Fit, end: Any, failures: int, told: list[str]
) -> None:
    found = Trainers(fit, fit.channel, 1, 1)
    started(fit, 1)
    found.add(2)
    started(fit, 2)
    found.stand_by(1)
    started(fit, 3)
    fit.end(2, TrainResult(interrupted=LEFT))
    fit.end(1, end)
    with said() as lines:
        until(lambda: found.ended(None) or found.workers == 1)
        assert not found.ended(None)  # counted out once
    assert (found.workers, found.failures, fit.asked) == (1, failures, [2, -2])
    assert lines == told


@pytest.mark.lengthy
@pytest.mark.parametrize("there_again", [False, True])
def test_others_train_on_when_the_first_ones_node_is_lost(fit: Fit, there_again: bool) -> None:
    found = Trainers(fit, fit.channel, 1, 2)
    started(fit, 1)
    if there_again:
        found.add(1)
        started(fit, 2)
    fit.end(0, ControllerError(WorkerGroupStartupTimeoutError(2)))
    if there_again:
        with said() as lines:
            until(lambda: found.ended(None) or found.workers == 1)
            assert not found.ended(None)
        assert (found.workers, found.failures, fit.asked) == (1, 0, [1, -2])
        assert lines == ["warning: 2 workers will not come back: Ray has no room for them any more"]
        fit.end(1, RuntimeError("broken"))
    until(lambda: found.ended(None))
    with pytest.raises(ControllerError):
        found.result()


@pytest.mark.parametrize("error", [RuntimeError("broken"), ControllerError(RuntimeError("broken"))])
def test_any_other_failure_of_the_first_ends_the_attempt(fit: Fit, error: Exception) -> None:
    found = Trainers(fit, fit.channel, 1, 2)
    started(fit, 1)
    found.add(1)
    started(fit, 2)
    fit.end(0, error)
    until(lambda: found.ended(None))
    assert found.workers == 3


@pytest.mark.lengthy
def test_workers_that_end_with_the_training_are_not_missed(fit: Fit) -> None:
    found = Trainers(fit, fit.channel, 1, 1)
    started(fit, 1)
    found.add(1)
    started(fit, 2)
    fit.end(1, TrainResult(interrupted=LEFT))
    threading.Event().wait(0.1)
    assert not found.ended(None)  # the driver asked for the result a moment too early
    assert found.ended(TrainResult())
    assert (found.workers, fit.asked) == (2, [1])


@pytest.mark.lengthy
@pytest.mark.parametrize("at_once", [False, True])
def test_a_trainer_that_does_not_end_is_ended(fit: Fit, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped driver does not wait for its workers."""
    found = Trainers(fit, fit.channel, 1, 2)
    started(fit, 1)
    monkeypatch.setattr(driver, "ENDING", 0.2)
    monkeypatch.setattr(ray_internals, "end_train_controllers", lambda: fit.end(0, RuntimeError("killed")))
    found.end(at_once)
    assert found.ended(None)
    assert fit.asked == ([] if at_once else ["training has ended"])


@pytest.mark.ray
def test_a_channel_that_died_is_one_line(ray_with: Callable[[int], None]) -> None:
    import ray

    ray_with(1)
    channel = make_channel(ray.get_runtime_context().get_node_id())
    assert given(channel) is None
    ray.kill(channel)
    with pytest.raises(TryAgain, match="same command again to resume"):
        given(channel)


@pytest.mark.parametrize(
    ("missing", "words"),
    [("_create_workers", "has no attribute '_create_workers'"), (None, "")],
)
def test_on_a_ray_that_is_other_inside_a_lost_worker_restarts_all(
    missing: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup as RaysGroup

    if missing:
        monkeypatch.delattr(RaysGroup, missing)
    with said() as lines:
        assert in_place(tiny.config(), {"CPU": 1.0}) is (missing is None)
        assert not in_place(tiny.config(), {"CPU": 1.0, "GPU": 1.0})
        assert not in_place(tiny.config(cluster__strategy="fsdp"), {"CPU": 1.0})
    assert len(lines) == (missing is not None)
    assert all(words in line and "newest checkpoint" in line for line in lines)


# Workers that stand still.


SLEEP = "import sys, time; time.sleep(60)"


def test_only_workers_are_killed() -> None:
    other = subprocess.Popen([sys.executable, "-c", SLEEP])
    worker = subprocess.Popen([sys.executable, "-c", SLEEP, "ray::RayTrainWorker"])
    try:
        os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(0.5)  # until both have their command lines
        assert not kill_worker(other.pid)
        assert kill_worker(worker.pid)
        assert worker.wait(10) == -signal.SIGKILL
        assert not kill_worker(worker.pid)
        assert other.poll() is None
    finally:
        for process in (other, worker):
            process.kill()
            process.wait()


@pytest.mark.ray
def test_a_stopped_worker_is_ended_by_a_task_on_its_node(ray_with: Callable[[int], None]) -> None:
    import ray

    ray_with(1)
    worker = subprocess.Popen([sys.executable, "-c", SLEEP, "ray::RayTrainWorker"])
    try:
        time.sleep(0.5)
        os.kill(worker.pid, signal.SIGSTOP)
        node = ray.get_runtime_context().get_node_id()
        end_hung(Member("gone", 1, ("127.0.0.1", 1), node, process=worker.pid))
        assert worker.wait(60) == -signal.SIGKILL
    finally:
        worker.kill()
