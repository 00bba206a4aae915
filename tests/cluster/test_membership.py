"""Who is in a group: the rules, without processes (those are in test_in_place.py)."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import pytest

from olora_ray.cluster import membership
from olora_ray.cluster.groups import Absent, Finished, Group, Member, Orders
from olora_ray.cluster.membership import Membership


def member(rank: int, node: str = "") -> Member:
    return Member(f"w{rank}", rank, ("127.0.0.1", 1), node)


class Hall:
    """A membership, and those that wait in it."""

    def __init__(self, wanted: int) -> None:
        self.dead: set[str] = set()
        self.membership = Membership(wanted, lambda one: one.name in self.dead)

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


def run(work: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(work, 5)

    return asyncio.run(limited())


def test_the_first_group_waits_for_as_many_as_are_wanted() -> None:
    async def work() -> None:
        hall = Hall(3)
        one, two = await hall.comes(2), await hall.comes(0)
        assert not await hall.membership.running()
        assert not await hall.membership.trains()
        three = await hall.comes(1)
        assert ranks(await one) == ranks(await two) == ranks(await three) == [0, 1, 2]
        assert (await one).begins
        assert await hall.membership.running()
        assert await hall.membership.trains()

    run(work())


def test_who_is_left_goes_on_and_the_order_stays() -> None:
    async def work() -> None:
        hall = Hall(3)
        first = await hall.group(0, 1, 2)
        hall.dead.add("w0")
        two, one = await hall.comes(2, lost=True), await hall.comes(1, lost=True)
        group = await two
        assert group == await one
        assert (ranks(group), group.begins, group.why) == ([1, 2], False, "worker 0 died")
        assert group.number > first.number

    run(work())


def test_a_loss_is_told_to_those_that_do_not_notice() -> None:
    async def work() -> None:
        hall = Hall(2)
        group = await hall.group(0, 1)
        beat = asyncio.create_task(hall.membership.beat("w1", group.number))
        await asyncio.sleep(0)
        again = await hall.comes(0, lost=True)
        assert await beat == Orders(over=True)
        await hall.comes(1, lost=True)
        assert (await again).why == "a connection was lost"

    run(work())


def test_a_newcomer_is_met_at_a_border() -> None:
    async def work() -> None:
        hall = Hall(2)
        group = await hall.group(0, 1)
        new = await hall.comes(7)
        assert await hall.membership.beat("w0", group.number) == Orders()  # it is not wanted
        await hall.membership.want(1)
        assert await hall.membership.beat("w0", group.number) == Orders(meet=True)
        await hall.comes(0)
        await hall.comes(1)
        assert ranks(await new) == [0, 1, 7]

    run(work())


def test_one_that_died_while_it_waited_does_not_come_in() -> None:
    async def work() -> None:
        hall = Hall(3)
        await hall.group(0, 1, 2)
        spare = await hall.comes(7)
        hall.dead |= {"w2", "w7"}
        one, two = await hall.comes(0, lost=True), await hall.comes(1, lost=True)
        assert ranks(await one) == ranks(await two) == [0, 1]
        with pytest.raises(ConnectionError):
            await spare

    run(work())


def test_a_group_is_complete_when_another_one_would_be_a_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MISSED", -1.0)  # nobody here gives signs of life

    async def work() -> None:
        hall = Hall(2)
        assert not await hall.membership.complete()
        await hall.comes(9)
        assert not await hall.membership.complete()  # those that begin wait for nobody's step
        await hall.comes(0)
        assert await hall.membership.complete()
        hall.dead.add("w0")
        assert not await hall.membership.complete()
        await hall.comes(7)
        assert await hall.membership.complete()
        hall.dead.add("w7")
        assert not await hall.membership.complete()

    run(work())


def test_nobody_looks_for_members_that_have_just_been_heard() -> None:
    """A look at each of hundreds would hold up those that want to meet."""

    async def work() -> None:
        hall = Hall(1)
        await hall.group(0)
        hall.dead.add("w0")
        assert await hall.membership.complete()

    run(work())


def test_when_all_are_gone_others_begin_anew() -> None:
    async def work() -> None:
        hall = Hall(2)
        await hall.group(0, 1)
        hall.dead |= {"w0", "w1"}
        assert not await hall.membership.running()
        assert (await hall.group(2, 3)).begins

    run(work())


def test_nobody_waits_for_those_that_were_wanted_and_are_no_more() -> None:
    async def work() -> None:
        hall = Hall(2)
        await hall.membership.begin_anew(1, 0)
        await hall.group(0)
        await hall.membership.want(1)
        await hall.membership.want(-1)
        hall.dead.add("w0")
        assert not await hall.membership.running()
        assert (await hall.group(2)).begins

    run(work())


def test_a_group_has_one_member_at_least() -> None:
    async def work() -> None:
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

    run(work())


def test_a_member_of_an_old_group_has_to_come_again() -> None:
    async def work() -> None:
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

    run(work())


def test_those_that_were_all_given_up_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "SILENCE", 0.2)

    async def work() -> None:
        hall = Hall(2)
        group = await hall.group(0, 1)
        await asyncio.sleep(0.5)
        assert not await hall.membership.trains()
        assert await hall.membership.beat("w0", group.number) == Orders(over=True)
        again, _ = await hall.comes(0, lost=True), await hall.comes(1, lost=True)
        assert (await again).begins

    run(work())


def test_members_leave_nodes_that_are_taken_away_unless_all_would() -> None:
    async def work() -> None:
        hall = Hall(2)
        one, _ = await hall.comes(0, "a"), await hall.comes(1, "b")
        number = (await one).number
        assert not await hall.membership.drain({"a", "b"})
        assert await hall.membership.beat("w1", number) == Orders()
        assert await hall.membership.drain({"b"})
        assert await hall.membership.beat("w1", number) == Orders(meet=True, leave=True)
        assert await hall.membership.beat("w0", number) == Orders(meet=True)

    run(work())


def test_nobody_waits_for_a_group_that_will_not_come() -> None:
    async def work() -> None:
        hall = Hall(1)
        await hall.group(0)
        spare = await hall.comes(1)
        await hall.membership.finish()
        with pytest.raises(Finished):
            await spare
        with pytest.raises(Finished):
            await hall.membership.meet(member(2))

    run(work())


def test_the_driver_hears_of_members_that_hang_and_of_their_being_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "SILENCE", 1.0)

    async def work() -> None:
        hall = Hall(2)
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
        monkeypatch.setattr(membership, "SILENCE", 20.0)
        waiting = await hall.comes(2)
        assert (await hall.membership.absent()).nobody_for < alone
        await asyncio.sleep(0.1)  # the other one does not come: its node is gone
        assert 0.1 <= (await hall.membership.absent()).nobody_for < 5
        await hall.group(3)
        assert (await waiting).begins
        assert await hall.membership.absent() == Absent()

    run(work())


def test_members_are_not_given_up_when_nobody_could_be_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "SILENCE", 1.5)

    async def work() -> None:
        hall = Hall(2)
        group = await hall.group(0, 1)
        await asyncio.sleep(0.2)
        time.sleep(2)  # the process of the membership stands still
        await asyncio.sleep(0.2)
        assert await hall.membership.absent() == Absent()
        assert await hall.membership.beat("w0", group.number) == Orders()

    run(work())
