"""Who is in a group: the rules, without processes (those are in test_in_place.py)."""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray

from olora_ray.cluster.channel import DriverChannel
from olora_ray.cluster.membership.state import (
    TRANSITIONS,
    Absent,
    Event,
    Finished,
    Group,
    Member,
    Membership,
    Orders,
    Phase,
)
from olora_ray.cluster.membership.train_backend import LateStart
from olora_ray.cluster.spec import LEFT, TrainResult


def member(rank: int, node: str = "") -> Member:
    return Member(f"w{rank}", rank, ("127.0.0.1", 1), node)


class Hall:
    """A membership, and those that wait in it."""

    def __init__(self, wanted: int, silence: float = 20.0) -> None:
        self.dead: set[str] = set()
        self.membership = Membership(wanted, lambda one: one.name in self.dead, silence)

    async def comes(self, rank: int, node: str = "", lost: bool = False) -> "asyncio.Task[Group]":
        task = asyncio.create_task(self.membership.meet(member(rank, node), lost))
        await asyncio.sleep(0)
        return task

    async def group(self, *ranks: int) -> Group:
        tasks = [await self.comes(rank) for rank in ranks]
        found = {(await task).number: await task for task in tasks}
        assert len(found) == 1
        return next(iter(found.values()))


def ranks(group: Group) -> list[int]:
    return [one.rank for one in group.members]


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test for five seconds at most."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 5))

    return run


@in_loop
async def test_the_first_group_waits_for_as_many_as_are_wanted() -> None:
    hall = Hall(3)
    one, two = await hall.comes(2), await hall.comes(0)
    assert not await hall.membership.running()
    three = await hall.comes(1)
    assert ranks(await one) == ranks(await two) == ranks(await three) == [0, 1, 2]
    assert (await one).begins
    assert await hall.membership.running()


@in_loop
async def test_a_loss_is_told_to_those_that_do_not_notice() -> None:
    hall = Hall(2)
    group = await hall.group(0, 1)
    beat = asyncio.create_task(hall.membership.beat("w1", group.number))
    await asyncio.sleep(0)
    again = await hall.comes(0, lost=True)
    assert await beat == Orders(over=True)
    await hall.comes(1, lost=True)
    assert (await again).why == "a connection was lost"


@in_loop
async def test_one_that_died_while_it_waited_does_not_come_in() -> None:
    hall = Hall(3)
    await hall.group(0, 1, 2)
    spare = await hall.comes(7)
    hall.dead |= {"w2", "w7"}
    one, two = await hall.comes(0, lost=True), await hall.comes(1, lost=True)
    assert ranks(await one) == ranks(await two) == [0, 1]
    with pytest.raises(ConnectionError):
        await spare


@in_loop
async def test_a_group_is_complete_when_another_one_would_be_a_spare() -> None:
    hall = Hall(2)
    assert not await hall.membership.complete()
    await hall.comes(9)
    assert not await hall.membership.complete()  # those that begin wait for nobody's step
    await hall.comes(0)
    assert await hall.membership.complete()
    await hall.membership.leave("w0", "failed")
    assert not await hall.membership.complete()
    await hall.comes(7)
    assert await hall.membership.complete()
    await hall.membership.leave("w7", "failed")
    assert not await hall.membership.complete()


@in_loop
async def test_when_all_are_gone_others_begin_anew() -> None:
    hall = Hall(2)
    await hall.group(0, 1)
    hall.dead |= {"w0", "w1"}
    new = await hall.comes(2)  # one that waits for them is reason enough to look whether they have died
    await asyncio.sleep(0.3)
    assert not await hall.membership.running()
    await hall.comes(3)
    assert (await new).begins


@in_loop
async def test_nobody_waits_for_those_that_were_wanted_and_are_no_more() -> None:
    hall = Hall(2)
    await hall.membership.begin_anew(1, 0)
    await hall.group(0)
    await hall.membership.want(1)
    await hall.membership.want(-1)
    await hall.membership.leave("w0", "failed")
    assert not await hall.membership.running()
    assert (await hall.group(2)).begins


@in_loop
async def test_a_group_has_one_member_at_least() -> None:
    hall = Hall(1)
    await hall.group(0)
    await hall.membership.want(-1)  # a spare trains in its place
    await hall.membership.leave("w0", "left")
    group = await hall.group(1)
    assert ranks(group) == [1]
    waiting = await hall.comes(2)
    await hall.membership.want(1)
    assert await hall.membership.beat("w1", group.number) == Orders()  # the place is the spare's
    assert not waiting.done()


@in_loop
async def test_a_member_of_an_old_group_has_to_come_again() -> None:
    hall = Hall(2)
    old = await hall.group(0, 1)
    await hall.membership.leave("w1", "left")
    new = await hall.comes(0, lost=True)
    assert ranks(await new) == [0]
    assert await hall.membership.beat("w1", old.number) == Orders(over=True)
    late = await hall.comes(1, lost=True)  # given up by mistake
    assert await hall.membership.beat("w0", (await new).number) == Orders(meet=True)
    await hall.comes(0)
    assert ranks(await late) == [0, 1]


@in_loop
async def test_those_that_were_all_given_up_hear_of_it() -> None:
    hall = Hall(2, silence=0.2)
    group = await hall.group(0, 1)
    await asyncio.sleep(0.5)
    assert await hall.membership.beat("w0", group.number) == Orders(over=True)
    again, _ = await hall.comes(0, lost=True), await hall.comes(1, lost=True)
    assert (await again).begins


@in_loop
async def test_nobody_waits_for_a_group_that_will_not_come() -> None:
    hall = Hall(1)
    await hall.group(0)
    spare = await hall.comes(1)
    await hall.membership.close()
    with pytest.raises(Finished):
        await spare
    with pytest.raises(Finished):
        await hall.membership.meet(member(2))


@in_loop
async def test_the_driver_hears_of_members_that_hang_and_of_their_being_none() -> None:
    hall = Hall(2, silence=1.0)
    assert await hall.membership.absent() == Absent(began=False)
    early = await hall.comes(0)
    await asyncio.sleep(0.1)  # the other one does not come: its node was lost while it started
    absent = await hall.membership.absent()
    assert not absent.began
    assert 0.1 <= absent.nobody_for < 5
    await hall.comes(1)
    group = await early
    for _ in range(15):
        await asyncio.sleep(0.1)
        await asyncio.wait_for(hall.membership.beat("w0", group.number), 1)
    assert await hall.membership.absent() == Absent(hung=(member(1),))
    assert await hall.membership.absent() == Absent()
    await hall.membership.leave("w0", "left")
    await asyncio.sleep(0.1)
    alone = (await hall.membership.absent()).nobody_for
    assert 0.1 <= alone < 5
    hall.membership.silence = 20.0
    waiting = await hall.comes(2)
    assert (await hall.membership.absent()).nobody_for < alone
    await asyncio.sleep(0.1)  # the other one does not come: its node is gone
    assert 0.1 <= (await hall.membership.absent()).nobody_for < 5
    await hall.group(3)
    assert (await waiting).begins
    assert await hall.membership.absent() == Absent()


@in_loop
async def test_members_are_not_given_up_when_nobody_could_be_heard() -> None:
    hall = Hall(2, silence=1.5)
    group = await hall.group(0, 1)
    await asyncio.sleep(0.2)
    time.sleep(2)  # the process of the membership stands still
    await asyncio.sleep(0.2)
    assert await hall.membership.absent() == Absent()
    assert await hall.membership.beat("w0", group.number) == Orders()


@in_loop
async def test_a_group_is_lost_formed_and_deserted_as_the_table_says() -> None:
    hall = Hall(1)
    assert hall.membership.phase is Phase.GATHERING
    group = await hall.group(0)
    assert hall.membership.phase is Phase.TRAINING
    hall.dead.add("w0")
    waiting = await hall.comes(1)
    await hall.membership.begin_anew(1, 2)
    assert hall.membership.phase is Phase.GATHERING
    with pytest.raises(ConnectionError):
        await waiting
    with pytest.raises(ConnectionError):
        await hall.membership.meet(member(2))  # of the attempt before
    assert await hall.membership.beat("w0", group.number) == Orders(over=True)
    assert {phase for phase, _ in TRANSITIONS} == set(Phase)
    assert {event for _, event in TRANSITIONS} == set(Event)


# The moment at which a worker whose group may change begins to work.


class Place(Hall):
    """The channel's class without an actor, and its members."""

    def __init__(self) -> None:
        super().__init__(1)
        channel: Any = DriverChannel
        self.place = self.membership = channel.__ray_metadata__.modified_class()
        self.place.died = lambda one: one.name in self.dead

    def asks(self) -> "asyncio.Task[bool]":
        return asyncio.create_task(self.place.moment_to_start())


async def waits(moment: "asyncio.Task[bool]") -> bool:
    await asyncio.sleep(0.1)
    return not moment.done()


@in_loop
async def test_one_that_would_be_a_spare_starts_when_a_step_is_done() -> None:
    hall = Place()
    assert await hall.asks()  # nobody trains
    await hall.group(0)
    moment = hall.asks()
    for message in ("a line", {"step": 0.0, "eval/loss": 2.0}):
        await hall.place.send(message)
        assert await waits(moment)
    await hall.place.send({"step": 1.0, "train/loss": 2.0})
    assert await moment
    await hall.place.want(1)
    assert await hall.asks()  # it is needed


@pytest.mark.parametrize("what", ["has left", "has to leave", "another is wanted"])
@in_loop
async def test_one_that_is_needed_meanwhile_waits_no_longer(what: str) -> None:
    hall = Place()
    await hall.place.begin_anew(2, 0)
    one, two = await hall.comes(0, "n0"), await hall.comes(1, "n1")
    await asyncio.gather(one, two)
    moment = hall.asks()
    assert await waits(moment)
    if what == "has left":
        await hall.place.leave("w1", "failed")
    elif what == "has to leave":
        assert await hall.place.drain_nodes({"n1"})
    else:
        await hall.place.want(1)
    assert await moment


@in_loop
async def test_one_that_waits_when_the_training_ends_does_not_start() -> None:
    hall = Place()
    await hall.group(0)
    moment = hall.asks()
    assert await waits(moment)
    await hall.place.finish("a result")
    assert not await asyncio.wait_for(moment, 5)


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
