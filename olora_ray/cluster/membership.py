"""Membership of a training: who takes part in it, from one group of workers to the next.

Workers come, die, hang and leave while a training runs. Those that take part at a time are a group, with a number. A
group ends when one of its members is gone, or at the border of a step when somebody wants in or out; then all that are
left meet here, with those that have come, and are the next group. Any members will do, since the bytes of a training do
not depend on their number (train/tree.py): so nobody is waited for, and a member that was given up by mistake comes
again as a new one.

This is the logic, to be called in one event loop; a training has it in the actor of its channel (cluster/channel.py).
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection

from olora_ray.cluster.groups import Absent, Finished, Group, Member, Orders
from olora_ray.common.text import plural

SILENCE = 20.0
"""Seconds without a sign of life after which a member counts as lost."""
DOUBT = 3.0
"""Seconds without one after which it is looked whether it has died."""
PATIENCE = 1.0
"""Seconds for which `beat` waits for something to tell."""
MISSED = PATIENCE + 0.5
"""Seconds after which a member would have given another sign of life."""
TICK = 0.1
"""Seconds between two looks at members that are missed."""
BLOCKED = 1.0
"""Seconds without a look in which this process stood still, and not the members."""
LOOKS = 16
"""Members that are looked at each time: of hundreds that are missed at once most are only late."""

Died = Callable[[Member], bool]
"""Whether a member is certainly gone; called while it is missed, must not take long."""


class Membership:
    """Forms the groups."""

    def __init__(self, wanted: int, died: Died) -> None:
        """Groups have `wanted` members: the first waits for as many, later ones take fewer, but never more."""
        self.wanted, self.died, self.attempt = wanted, died, 0
        self.group: Group | None = None
        self._number = 0
        self._seen: dict[str, float] = {}
        self._here: dict[str, tuple[Member, asyncio.Future[Group]]] = {}
        """Who waits for the next group."""
        self._gone: dict[str, str] = {}
        """Members of the group that are gone, and why."""
        self._hung: list[Member] = []
        self._empty_since: float | None = None
        """When the last member of the group was lost, or somebody has come since, or for the first; else None."""
        self._began = False
        """Whether there was a group."""
        self._leaving: frozenset[str] = frozenset()
        """Ids of nodes that are going to be taken away."""
        self._over = self._finished = False
        self._changed = asyncio.Event()
        self._watching = False
        self._looked = time.monotonic()

    async def meet(self, member: Member, lost: bool = False) -> Group:
        """Wait for the others; the next group. `lost`: because an exchange with them has failed.

        A process that was no member before comes in with the next group, or waits until one is wanted. Raises
        Finished, and ConnectionError if it was given up meanwhile.
        """
        if self._finished:
            raise Finished
        if member.attempt != self.attempt:
            raise ConnectionError("this worker is of an earlier attempt")
        self._begin_watch()
        self._seen[member.name] = time.monotonic()
        future: asyncio.Future[Group] = asyncio.get_running_loop().create_future()
        self._here[member.name] = member, future
        if self.group is None:
            self._empty_since = time.monotonic()  # others may be on their way, too
        self._over |= lost and self._is_member(member.name)
        self._form()
        self._tell()
        return await future

    async def beat(self, name: str, number: int) -> Orders:
        """A sign of life of a member of the group `number` (0: of none); what it has to do, once there is something."""
        self._begin_watch()
        end = time.monotonic() + PATIENCE
        while True:
            self._seen[name] = time.monotonic()
            orders, changed = self._orders(name, number), self._changed
            left = end - time.monotonic()
            if orders != Orders() or left <= 0:
                return orders
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)

    async def running(self) -> bool:
        """Whether there is a group that trains."""
        for member in self._present():
            if self.died(member):
                self._lose(member.name, "died")
                self._over = True
        self._form()
        return self.group is not None

    async def trains(self) -> bool:
        """Whether there is a group, as far as is known: `running` without a look at each member."""
        return self.group is not None

    async def complete(self) -> bool:
        """Whether as many as are wanted train, or are here to: another one would be a spare."""
        others = [member for name, (member, _) in self._here.items() if not self._is_member(name)]
        found = [member for member in [*self._present(), *others] if member.node not in self._leaving]
        if self.group is None or len(found) < self._size():
            return False
        long_ago = time.monotonic() - MISSED
        missed = [member for member in found if self._seen.get(member.name, 0.0) < long_ago]
        dead = sum(self.died(member) for member in random.sample(missed, min(LOOKS, len(missed))))
        return len(found) - dead >= self._size()

    async def leave(self, name: str, why: str) -> None:
        """A member goes, which has `left` or `failed`."""
        self._lose(name, why)
        self._form()
        self._tell()

    async def drain(self, nodes: Collection[str]) -> bool:
        """Have the members on these nodes leave after the step under way; False if no others would be left."""
        if not any(member.node not in nodes for member in self._present()):
            return False
        self._leaving = frozenset(nodes)
        self._tell()
        return True

    async def want(self, more: int) -> None:
        """From now on groups have so many more members; below 0: so many fewer, but at least one."""
        self.wanted += more
        self._form()
        self._tell()

    async def absent(self) -> Absent:
        """Who is missing."""
        hung, self._hung = tuple(self._hung), []
        return Absent(hung, 0.0 if self._empty_since is None else time.monotonic() - self._empty_since, self._began)

    async def finish(self) -> None:
        """The training has ended: who waits here waits for nothing."""
        self._finished = True
        for _, future in self._here.values():
            if not future.done():
                future.set_exception(Finished())
        self._here = {}

    async def begin_anew(self, wanted: int, attempt: int) -> None:
        """Forget everybody: other workers start, `wanted` of them."""
        self.wanted, self.attempt = wanted, attempt
        self.group, self._over, self._finished, self._began = None, False, False, False
        for name in list(self._here):
            self._lose(name, "was given up")
        self._seen, self._gone, self._leaving, self._hung, self._empty_since = {}, {}, frozenset(), [], None

    def _present(self) -> list[Member]:
        members = self.group.members if self.group else ()
        return [member for member in members if member.name not in self._gone]

    def _is_member(self, name: str) -> bool:
        return any(member.name == name for member in self._present())

    def _entering(self) -> list[Member]:
        """Those that come in with the next group: as many as are wanted."""
        present = self._present()
        others = [member for name, (member, _) in self._here.items() if not self._is_member(name)]
        stay = [member for member in present if member.node not in self._leaving]
        return sorted(others, key=lambda member: member.rank)[: max(0, self._size() - len(stay))]

    def _size(self) -> int:
        """Members that a group is to have: spares may train while nobody else is wanted."""
        return max(1, self.wanted)

    def _orders(self, name: str, number: int) -> Orders:
        if number == 0:
            return Orders()
        if self.group is None or number != self.group.number or not self._is_member(name):
            return Orders(over=True)  # it has missed the meeting, or was given up
        leaving = {member.name for member in self._present() if member.node in self._leaving}
        return Orders(over=self._over, meet=bool(leaving or self._entering()), leave=name in leaving)

    def _lose(self, name: str, why: str) -> None:
        if self._is_member(name):
            self._gone[name] = why
        self._seen.pop(name, None)
        _, future = self._here.pop(name, (None, None))
        if future and not future.done():
            future.set_exception(ConnectionError(f"this worker {why}"))

    def _form(self) -> None:
        """Make the next group if all are here that it needs."""
        present = self._present()
        if not present and self.group is not None:  # all are gone: those that come begin anew
            self.group, self._gone, self._over = None, {}, False
            self._empty_since = time.monotonic()
        for name in [member.name for member in self._entering() if self.died(member)]:
            self._lose(name, "died")
        come = self._entering()
        if self.group is None and len(come) >= self._size():
            self._set(come, begins=True, why="")
        elif self.group is not None and all(member.name in self._here for member in present):
            self._set([*present, *come], begins=False, why=self._why(len(come)))

    def _why(self, come: int) -> str:
        assert self.group is not None
        ranks = {member.name: member.rank for member in self.group.members}
        gone = [f"worker {ranks[name]} {why}" for name, why in self._gone.items()]
        return " and ".join(gone + ([f"{plural(come, 'worker')} joined"] if come else [])) or "a connection was lost"

    def _set(self, members: list[Member], begins: bool, why: str) -> None:
        self._number += 1
        self.group, self._empty_since = Group(self._number, tuple(members), begins, why), None
        self._gone, self._over, self._began = {}, False, True
        for member in members:
            _, future = self._here.pop(member.name)
            if not future.done():  # the caller is gone
                future.set_result(self.group)

    def _look(self) -> bool:
        """Give up the members that are certainly gone, or silent for too long; whether there were some."""
        now, lost = time.monotonic(), dict[str, str]()
        if now - self._looked > BLOCKED:  # nobody could be heard
            self._seen = {name: seen + now - self._looked for name, seen in self._seen.items()}
        self._looked = now
        missed = bool(self._here) or self._over
        doubted = []
        for member in [*self._present(), *(member for member, _ in self._here.values())]:
            silent = now - self._seen.get(member.name, now)
            if silent > SILENCE:
                lost[member.name] = f"gave no sign of life for {SILENCE:.0f} s"
                self._hung.append(member)
            elif silent > DOUBT or (missed and member.name not in self._here):
                doubted.append(member)
        for member in random.sample(doubted, min(LOOKS, len(doubted))):
            if self.died(member):
                lost[member.name] = "died"
        self._over |= any(self._is_member(name) for name in lost)
        for name, why in lost.items():
            self._lose(name, why)
        return bool(lost)

    def _begin_watch(self) -> None:
        if not self._watching:
            self._watching = True
            # No task: one that is pending when the actor is ended would be complained of.
            asyncio.get_running_loop().call_later(TICK, self._watch)

    def _watch(self) -> None:
        if self._look():
            self._form()
            self._tell()
        asyncio.get_running_loop().call_later(TICK, self._watch)

    def _tell(self) -> None:
        """Wake all that wait for something to do."""
        self._changed.set()
        self._changed = asyncio.Event()
