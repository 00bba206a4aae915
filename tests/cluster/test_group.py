"""A group of workers: its end, and workers that stand still."""

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

from olora_ray.cluster.channel import Member, make_channel
from olora_ray.cluster.group import Group, answer, end_hung, kill_worker
from olora_ray.cluster.spec import TrainResult
from olora_ray.common.errors import TryAgain
from tests.refused import refused

SLEEP = "import sys, time; time.sleep(60)"


@pytest.mark.parametrize("error", [None, RuntimeError("broken")])
def test_it_ends_with_what_the_workers_return_or_raise(error: Exception | None) -> None:
    end, asked = threading.Event(), list[str]()

    def fit(workers: int) -> TrainResult:
        end.wait(30)
        if error:
            raise error
        return TrainResult(problem=f"of {workers}")

    channel = SimpleNamespace(
        request_stop=SimpleNamespace(remote=lambda why: (asked.append(why), end.set()))
    )
    found = Group(fit, 2, channel)
    assert not found.ended()
    found.end()
    assert found.ended()
    assert asked == ["training has ended"]
    if error is None:
        assert found.result().problem == "of 2"
    else:
        with pytest.raises(RuntimeError, match="broken"):
            found.result()


@pytest.mark.ray
def test_a_channel_tells_of_silent_workers_and_ends(ray_with: Callable[[int], None]) -> None:
    ray_with(1)
    channel = make_channel()
    a_worker_is_silent_after_a_time_and_not_in_the_next_group(channel)
    a_stopped_worker_is_ended_by_a_task_on_its_node()
    a_channel_that_died_is_one_line(channel)


def a_channel_that_died_is_one_line(channel: Any) -> None:
    import ray

    def ask_on() -> None:
        for _ in range(100):  # Ray's kill returns before the process has ended
            assert answer(channel.result.remote()) is None
            time.sleep(0.1)

    ray.kill(channel)
    with refused("same command again to resume", TryAgain):
        ask_on()


def a_worker_is_silent_after_a_time_and_not_in_the_next_group(channel: Any) -> None:
    import ray

    def told(
        call: str, *arguments: Any
    ) -> Any:  # one after the other: the channel's methods are async
        return ray.get(getattr(channel, call).remote(*arguments))

    one, two = (Member(rank, "node", rank, str(rank)) for rank in (0, 1))
    for member in (one, two):
        told("alive", member)
    assert told("members", 60.0) == ([one, two], [])
    time.sleep(1.5)
    asked = channel.members.remote(1.0)  # looks again after two seconds, in which one gives signs
    while not ray.wait([asked], timeout=0.2)[0]:
        told("alive", one)
    assert ray.get(asked) == ([one, two], [two])
    told("request_stop", "SIGTERM")
    told("finish", TrainResult(problem="x"))
    assert told("result").problem == "x"
    told("begin")
    told("alive", two)  # of the group before: it had stood still
    assert told("members", 60.0) == ([], [])
    assert told("result") is None
    assert ray.wait([channel.wait_for_stop.remote()], timeout=0.5)[0] == []


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


def a_stopped_worker_is_ended_by_a_task_on_its_node() -> None:
    import ray

    worker = subprocess.Popen([sys.executable, "-c", SLEEP, "ray::RayTrainWorker"])
    try:
        time.sleep(0.5)
        os.kill(worker.pid, signal.SIGSTOP)
        end_hung(Member(1, ray.get_runtime_context().get_node_id(), worker.pid, "gone"))
        assert worker.wait(60) == -signal.SIGKILL
    finally:
        worker.kill()
