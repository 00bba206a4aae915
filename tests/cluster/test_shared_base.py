"""A process that several trials share, while it is not there."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psutil
import pytest
import ray
import torch

from olora_ray.cluster import shared_base
from olora_ray.cluster.malloc import keep_freed_memory
from tests import tiny

BLOCKS, BLOCK = 100, 2**20
"""Blocks of so many bytes that a training takes and frees."""


def test_trials_are_shared_out_and_use_the_memory_of_one_another(
    ray_with: Callable[[int], None],
) -> None:
    ray_with(2)
    spec = tiny.decided()
    actors = shared_base.start_actors(spec, {"CPU": 1}, 2, 4)
    those_who_come_at_the_same_time_are_shared_out(actors)
    threads_use_the_memory_that_others_have_freed(actors[0])


def those_who_come_at_the_same_time_are_shared_out(actors: Any) -> None:
    """The first trials of a search do: both would train on one process, turn by turn, beside one with nothing to do."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(shared_base.place_on, actors, adapters=4), map(str, range(8))))
    assert ray.get([actor.busy.remote() for actor in actors]) == [4, 4]


def threads_use_the_memory_that_others_have_freed(actor: Any) -> None:
    """Each trial of a search trains in another thread; else the process would grow by a step's memory with each."""
    ray.get(actor.__ray_call__.remote(lambda _: keep_freed_memory()))
    found = [ray.get(actor.__ray_call__.remote(_use_memory)) for _ in range(12)]
    assert len({thread for thread, _ in found}) > 4
    assert found[-1][1] - found[0][1] < BLOCKS * BLOCK


def _use_memory(_: Any) -> tuple[int, int]:
    """Return the thread, and the bytes of the process once what it has taken is free again."""
    taken = [torch.ones(BLOCK // 4) for _ in range(BLOCKS)]
    del taken
    return threading.get_ident(), psutil.Process().memory_info().rss


def test_a_place_is_not_kept_for_one_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny.decided()
    actor = shared_base.SharedBaseActor(spec)
    assert actor.take("a", 0)
    assert not actor.take("b", 0), "somebody has come meanwhile"
    assert (actor.take("b", 1), actor.busy()) == (True, 2)
    monkeypatch.setattr(shared_base, "EXPECTED", 0.0)
    assert actor.take("b", 2)
    assert actor.busy() == 1
