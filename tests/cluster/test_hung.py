"""A worker that stands still is ended, and nothing else that has its number."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from olora_ray.cluster.groups import Member
from olora_ray.cluster.hung import end_hung, kill_worker

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
