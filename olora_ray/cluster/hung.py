"""The end of a worker that stands still: Ray keeps its place for ten minutes, and its own kill asks that worker."""

import contextlib
import os
import signal
from pathlib import Path

import ray

from olora_ray.cluster.groups import Member

WORKER = b"RayTrainWorker"
"""In the command line of a worker of Ray Train, as Ray writes it."""


def end_hung(member: Member) -> None:
    """SIGKILL for the process of a member, by a task on its node; returns at once, and does nothing if it is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node_id=member.node, soft=False)
    ray.remote(kill_worker).options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(member.process)


def kill_worker(process: int) -> bool:
    """SIGKILL for a process of this node if it is a worker of Ray Train; whether it was."""
    with contextlib.suppress(OSError):
        if WORKER in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
            return True
    return False
