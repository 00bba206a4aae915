"""A process that several trials share, while it is not there."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError

from olora_ray.cluster import shared_base
from olora_ray.cluster.malloc import keep_freed_memory
from tests import tiny
from tests.said import said

BLOCKS, BLOCK = 100, 2**20
"""Blocks of so many bytes that a training takes and frees."""


def test_trials_are_shared_out_and_use_the_memory_of_one_another(ray_with: Callable[[int], None]) -> None:
    ray_with(2)
    spec: Any = tiny.config()
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


class Actor:
    """Stands for an actor with so many adapters; None: its node is lost."""

    def __init__(self, load: int | None, takes: bool = True) -> None:
        self.load, self.takes, self.asked = load, takes, 0
        self.busy, self.take = SimpleNamespace(remote=self._busy), SimpleNamespace(remote=self._take)

    def _busy(self) -> "Call":
        self.asked += 1
        return Call(self)

    def _take(self, name: str, seen: int) -> "Call":
        if not self.takes:  # it is lost in this moment
            self.load = None
        return Call(self, seen)


@dataclass(eq=False)
class Call:
    """A call of `busy`, or one of `take` by somebody who has seen so many adapters."""

    actor: Actor
    seen: int | None = None


class Slept(list[float]):
    """How long was slept each time, and what happens then."""

    happens: Callable[[], object] = staticmethod(lambda: None)

    def sleep(self, seconds: float) -> None:
        self.append(seconds)
        self.happens()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Slept:
    """With actors that are no processes: one whose node is lost never answers."""

    def wait(calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        assert (num_returns, timeout) == (len(calls), shared_base.ANSWERS)
        return [call for call in calls if call.actor.load is not None], []

    def get(call: Call, timeout: float | None = None) -> Any:
        if call.seen is None:
            return call.actor.load
        assert timeout == shared_base.ANSWERS
        if call.actor.load is None:
            raise GetTimeoutError
        return call.actor.load == call.seen

    found = Slept()
    monkeypatch.setattr(shared_base, "ray", SimpleNamespace(wait=wait, get=get))
    monkeypatch.setattr(shared_base, "time", SimpleNamespace(sleep=found.sleep))
    shared_base._tell_of_silent.cache_clear()
    return found


def test_a_process_whose_node_is_lost_holds_up_no_trial(slept: Slept) -> None:
    """It answers when there is room for it on another node, if ever, and each new trial asked it first."""
    actors = (Actor(None), Actor(3), Actor(1), Actor(0, takes=False))
    with said() as lines:
        assert shared_base.place_on(actors, "a", adapters=4) is actors[2]
        assert shared_base.place_on(actors, "b", adapters=4) is actors[2]
    assert not slept
    assert [actor.asked for actor in actors] == [2, 3, 3, 3]
    [line] = lines
    assert line.startswith("warning: search: ")
    assert "does not answer" in line


def test_no_process_gets_more_adapters_than_it_has_room_for(slept: Slept) -> None:
    """Where others are lost, theirs would come to it too."""
    lost, full = Actor(None), Actor(2)

    def one_ends() -> None:
        full.load = 2 - (len(slept) == 3)

    slept.happens = one_ends
    assert shared_base.place_on((lost, full), "a", adapters=2) is full
    assert slept == [shared_base.FULL] * 3
    assert (lost.asked, full.asked) == (1, 4)


def test_a_place_is_not_kept_for_one_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec: Any = tiny.config()
    actor = shared_base.SharedBaseActor(spec)
    assert actor.take("a", 0)
    assert not actor.take("b", 0), "somebody has come meanwhile"
    assert (actor.take("b", 1), actor.busy()) == (True, 2)
    monkeypatch.setattr(shared_base, "EXPECTED", 0.0)
    assert actor.take("b", 2)
    assert actor.busy() == 1
