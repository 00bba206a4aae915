"""When a worker whose group may change begins to work."""

import asyncio
from typing import Any

import pytest
import ray

from olora_ray.cluster.channel import DriverChannel
from olora_ray.cluster.groups import Member
from olora_ray.cluster.late_start import LateStart


def channel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The channel's class without an actor, and members that live."""
    monkeypatch.setattr("olora_ray.cluster.ray_internals.actor_died", lambda _: False)
    return DriverChannel.__ray_metadata__.modified_class()  # type: ignore[attr-defined]


async def waits(moment: "asyncio.Task[None]") -> bool:
    await asyncio.sleep(0.05)
    return not moment.done()


def test_one_that_would_be_a_spare_starts_when_a_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        place = channel(monkeypatch)
        assert not await waits(asyncio.create_task(place.moment_to_start()))  # nobody trains
        await place.meet(Member("w0", 0, ("127.0.0.1", 1)), False)
        moment = asyncio.create_task(place.moment_to_start())
        assert await waits(moment)
        await place.send("a line")
        assert await waits(moment)
        await place.send({"step": 1.0})
        assert not await waits(moment)
        await place.want(1)
        assert not await waits(asyncio.create_task(place.moment_to_start()))  # it is needed

    asyncio.run(asyncio.wait_for(work(), 20))


def test_nobody_waits_for_a_step_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        monkeypatch.setattr("olora_ray.cluster.channel.STEP", 0.1)
        place = channel(monkeypatch)
        await place.meet(Member("w0", 0, ("127.0.0.1", 1)), False)
        await place.moment_to_start()

    asyncio.run(asyncio.wait_for(work(), 20))


class Moment:
    """A channel whose moment comes at once."""

    def __init__(self) -> None:
        self.moment_to_start, self.asked = self, False

    def remote(self) -> str:
        self.asked = True
        return "moment"


def test_the_work_gets_the_channel_and_its_result_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Moment()
    monkeypatch.setattr(ray, "get", lambda awaited: None)
    assert LateStart(place, ray.cloudpickle.dumps(lambda given: given.asked))()
