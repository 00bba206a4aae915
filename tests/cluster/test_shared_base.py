"""A process that several trials share, while it is not there."""

import os
import signal
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from olora_ray.cluster import shared_base
from tests import tiny
from tests.waiting import until


def test_who_asks_a_process_that_has_died_waits_for_its_successor(ray_with: Callable[[int], None]) -> None:
    """It takes its time to start; else a trial would use up all its restarts meanwhile."""
    ray_with(1)
    spec: Any = tiny.config()
    [actor] = shared_base.start_actors(spec, {"CPU": 1}, 1, 4)
    first = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(first, signal.SIGKILL)
    until(lambda: unavailable(actor))
    assert ray.get(actor.busy.remote()) == 0
    assert ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) != first


def unavailable(actor: Any) -> bool:
    """Whether a call that does not wait fails."""
    try:
        ray.get(actor.__ray_ready__.remote())
        return False
    except RayActorError:
        return True
