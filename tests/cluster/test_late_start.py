"""When a worker whose group may change begins to work."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
import ray

from olora_ray.cluster import channel, membership
from olora_ray.cluster.groups import Member
from olora_ray.cluster.late_start import LateStart
from olora_ray.cluster.spec import LEFT, TrainResult

ROW = {"step": 1.0, "train/loss": 2.0}


class Hall:
    """The channel's class without an actor, and its members."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dead: set[str] = set()
        monkeypatch.setattr("olora_ray.cluster.ray_internals.actor_died", self.dead.__contains__)
        monkeypatch.setattr(membership, "MISSED", -1.0)  # nobody here gives signs of life
        monkeypatch.setattr(channel, "LOOK", 0.02)
        self.place: Any = channel.DriverChannel.__ray_metadata__.modified_class()  # type: ignore[attr-defined]

    async def trains(self, name: str = "w0", node: str = "") -> None:
        await self.place.meet(Member(name, 0, ("127.0.0.1", 1), node), False)

    def asks(self) -> "asyncio.Task[bool]":
        return asyncio.create_task(self.place.moment_to_start())


async def waits(moment: "asyncio.Task[bool]") -> bool:
    await asyncio.sleep(0.1)
    return not moment.done()


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 20)

    asyncio.run(limited())


def test_one_that_would_be_a_spare_starts_when_a_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        hall = Hall(monkeypatch)
        assert await hall.asks()  # nobody trains
        await hall.trains()
        moment = hall.asks()
        for message in ("a line", {"step": 0.0, "eval/loss": 2.0}):
            await hall.place.send(message)
            assert await waits(moment)
        await hall.place.send(ROW)
        assert await moment
        await hall.place.want(1)
        assert await hall.asks()  # it is needed

    run(work())


@pytest.mark.parametrize("what", ["dies", "has to leave", "another is wanted"])
def test_one_that_is_needed_meanwhile_waits_no_longer(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        hall = Hall(monkeypatch)
        await hall.place.begin_anew(2, 0)
        one, two = (asyncio.create_task(hall.trains(name, node=name)) for name in ("w0", "w1"))
        await asyncio.gather(one, two)
        moment = hall.asks()
        assert await waits(moment)
        if what == "dies":
            hall.dead.add("w1")
        elif what == "has to leave":
            assert await hall.place.drain_nodes({"w1"})
        else:
            await hall.place.want(1)
        assert await moment

    run(work())


def test_nobody_waits_for_a_step_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        hall = Hall(monkeypatch)
        monkeypatch.setattr(channel, "STEP", 0.1)
        await hall.trains()
        assert await hall.asks()

    run(work())


def test_one_that_waits_when_the_training_ends_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        hall = Hall(monkeypatch)
        monkeypatch.setattr(channel, "LOOK", 10.0)
        await hall.trains()
        moment = hall.asks()
        assert await waits(moment)
        await hall.place.finish("a result")
        assert not await asyncio.wait_for(moment, 5)

    run(work())


told: list[str] = []


class Work:
    """Says when it is unpickled, and when it is done."""

    def __setstate__(self, state: object) -> None:
        told.append("unpickled")

    def __getstate__(self) -> str:
        return "something"

    def __call__(self, given: object) -> object:
        told.append("works")
        return given


class Moment:
    """A channel that answers when it is waited for."""

    def __init__(self, answer: bool) -> None:
        self.moment_to_start, self.answer = self, answer

    def remote(self) -> bool:
        return self.answer


@pytest.mark.parametrize("starts", [True, False])
def test_nothing_is_unpickled_before_the_moment(starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: bool) -> bool:
        told.append("waited")
        return answer

    monkeypatch.setattr(ray, "get", get)
    work, place = ray.cloudpickle.dumps(Work()), Moment(starts)
    told.clear()
    found = LateStart(place, work)()
    assert (told, found) == (
        (["waited", "unpickled", "works"], place) if starts else (["waited"], TrainResult(interrupted=LEFT))
    )
