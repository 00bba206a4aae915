"""State machine of a membership: decides which workers train together, from one group to the next.

A *member* is a worker of the current group. A *newcomer* is a worker that waits for its first group; it is a *spare*
while the group has as many members as are wanted. An *attempt* is one start of workers by the driver.

A worker calls `meet` and waits there for its next group. Once a second it calls `beat`, whose answer is its orders. The
phase of the membership decides what happens next:

- GATHERING: no worker trains. Newcomers wait in `meet` until there are as many as are wanted; then they form a group.
- TRAINING: the group trains. If a newcomer is wanted, or a node will be taken away, all members get the order to meet
  after the current step.
- BROKEN: a member died, hangs, or cannot reach another one. The other members get the order to break off their step and
  meet at once.

After TRAINING and BROKEN, the next group forms when all remaining members wait in `meet`. Newcomers fill it up to the
wanted number. If no member remains, the phase is GATHERING again.

TRANSITIONS lists all changes of the phase. `_form` forms groups, and `_watch` removes members that died or hang. All
methods run in the event loop of one actor, the training's channel (cluster/channel.py), so they need no locks.
This module imports neither torch nor Ray, because Ray Train's controller unpickles its objects. docs/architecture.md
explains the design.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto

from olora_ray.common.text import plural


class Finished(Exception):
    """The training has ended: no other group will form."""


@dataclass(frozen=True)
class Member:
    """A worker process, in a group or waiting for one."""

    name: str
    """Id of its actor. A restarted worker has a new one, so a name never returns."""
    rank: int
    """Number of the worker in messages. Its rank in a group may differ."""
    store: tuple[str, int]
    """Host and port of its TCPStore. The members of a group connect through the store of their first member."""
    node: str = ""
    process: int = 0
    attempt: int = 0
    """The driver's attempt that started this worker. Members of an earlier attempt count as dead."""


@dataclass(frozen=True)
class Group:
    """Members that train together. The index of a member is its rank in torch's process group."""

    number: int
    members: tuple[Member, ...]
    begins: bool
    """True if no member has trained before: all start from the newest checkpoint, or from step 0 without one."""
    why: str = ""
    """Why the previous group ended: `worker 1 died`."""

    def rank_of(self, name: str) -> int:
        return next(rank for rank, member in enumerate(self.members) if member.name == name)


@dataclass(frozen=True)
class Absent:
    hung: tuple[Member, ...] = ()
    """Members removed for their silence since the last call. The driver kills their processes, which may still run."""
    nobody_for: float = 0.0
    """Seconds without a group, counted from the loss of its last member or from the arrival of the last newcomer."""
    began: bool = True
    """True if a group has formed in this attempt."""


@dataclass(frozen=True)
class Orders:
    """Orders to a member. Without any, it trains the next step."""

    over: bool = False
    """Break off the current exchange and meet the others: a member of the group is lost."""
    meet: bool = False
    """Meet the others after this step: the group changes."""
    leave: bool = False
    """Leave after this step instead of meeting: the node will be taken away."""


class Phase(Enum):
    GATHERING = auto()
    """No worker trains. Newcomers wait in `meet` until there are as many as are wanted."""
    TRAINING = auto()
    """A group trains."""
    BROKEN = auto()
    """The group has lost a member or a connection. The remaining members must break off their step and meet."""


class Event(Enum):
    FORMED = auto()
    """All members that the next group needs wait in `meet`."""
    LOST = auto()
    """A member died, hangs, or cannot reach another member."""
    DESERTED = auto()
    """The group has lost its last member. Newcomers start again from the newest checkpoint."""
    RESET = auto()
    """The driver starts other workers."""


TRANSITIONS = {
    (Phase.GATHERING, Event.FORMED): Phase.TRAINING,
    (Phase.TRAINING, Event.FORMED): Phase.TRAINING,  # between two steps: a newcomer joined, or a member left
    (Phase.BROKEN, Event.FORMED): Phase.TRAINING,
    (Phase.TRAINING, Event.LOST): Phase.BROKEN,
    (Phase.BROKEN, Event.LOST): Phase.BROKEN,
    (Phase.TRAINING, Event.DESERTED): Phase.GATHERING,
    (Phase.BROKEN, Event.DESERTED): Phase.GATHERING,
    **{(phase, Event.RESET): Phase.GATHERING for phase in Phase},
}
"""All transitions. Any other pair of phase and event is a bug."""


class Membership:
    """The members, the newcomers and the phase of one training.

    The first group waits for `wanted` members. Later groups may have fewer, but never more. `died` returns True if a
    member is certainly dead; it is called often, so it must return within milliseconds. A member that sends no beat for
    `silence` seconds counts as lost.
    """

    def __init__(self, wanted: int, died: Callable[[Member], bool], silence: float = 20.0) -> None:
        self.wanted, self.died, self.silence, self.attempt = wanted, died, silence, 0
        self.phase = Phase.GATHERING
        self.group: Group | None = None
        """The newest group; None while GATHERING."""
        self.waiting: dict[str, tuple[Member, asyncio.Future[Group]]] = {}
        """Name -> member or newcomer that waits in `meet`, and the future that gives it the next group."""
        self._number = 0
        self._last_beat: dict[str, float] = {}
        self._gone: dict[str, str] = {}
        """Name -> why this member of the group is lost or has left."""
        self._hung: list[Member] = []
        self._empty_since: float | None = None
        """Start of `Absent.nobody_for`; None while a group trains, and before the first newcomer."""
        self._leaving_nodes: frozenset[str] = frozenset()
        self._began = self._finished = self._watching = False
        self._changed = asyncio.Event()
        self._last_watch = time.monotonic()

    # The methods that workers call.

    async def meet(self, member: Member, lost: bool = False) -> Group:
        """Wait for the next group and return it.

        `lost`: an exchange with another member has failed. A newcomer that is not wanted (a spare) waits until a member
        is missing. Raises Finished after the end of the training, and ConnectionError if this member was removed.
        """
        if self._finished:
            raise Finished
        if member.attempt != self.attempt:
            raise ConnectionError("this worker belongs to an earlier attempt")
        self._begin_watch()
        self._last_beat[member.name] = time.monotonic()
        future: asyncio.Future[Group] = asyncio.get_running_loop().create_future()
        self.waiting[member.name] = member, future
        if self.phase is Phase.GATHERING:
            # Each newcomer restarts the driver's timeout: the others may be on their way, too.
            self._empty_since = time.monotonic()
        elif lost and self._is_member(member.name):
            # The membership may see all members alive. Only this one knows that a connection is lost, and the others
            # must hear of it: they may wait in an exchange with it.
            self._change_phase(Event.LOST)
        self._form()
        return await future

    async def beat(self, name: str, number: int) -> Orders:
        """Record that a member of group `number` (0: of no group) is alive, and return its orders.

        Waits up to a second for orders, so that a member hears of a loss at once.
        """
        self._begin_watch()
        end = time.monotonic() + 1.0
        while True:
            self._last_beat[name] = time.monotonic()
            orders, changed = self._orders(name, number), self._changed
            left = end - time.monotonic()
            if orders != Orders() or left <= 0:
                return orders
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)

    async def leave(self, name: str, why: str) -> None:
        self._lose(name, why)
        self._form()

    async def running(self) -> bool:
        """True if a group trains or is broken. Its members may all be dead without anybody having noticed yet."""
        return self.phase is not Phase.GATHERING

    async def complete(self) -> bool:
        """True if there are as many members and newcomers as are wanted. Another worker would be a spare."""
        workers = [*self._remaining(), *self._newcomers()]
        staying = [member for member in workers if member.node not in self._leaving_nodes]
        return self.phase is not Phase.GATHERING and len(staying) >= self._size()

    # The methods that the driver calls.

    async def begin_anew(self, wanted: int, attempt: int) -> None:
        """Remove all members and newcomers: the driver starts `wanted` other workers."""
        for name in list(self.waiting):
            self._lose(name, "was replaced")
        self._change_phase(Event.RESET)
        self.wanted, self.attempt, self.group = wanted, attempt, None
        self._finished, self._began, self._empty_since = False, False, None
        self._last_beat, self._gone, self._leaving_nodes, self._hung = {}, {}, frozenset(), []

    async def want(self, more: int) -> None:
        """Change the size of later groups by `more` members, which may be negative. A group keeps at least one."""
        self.wanted += more
        self._form()

    async def drain_nodes(self, nodes: Collection[str]) -> bool:
        """Order the members on these nodes to leave after the current step.

        Returns False, and orders nothing, if no member would remain.
        """
        if not any(member.node not in nodes for member in self._remaining()):
            return False
        self._leaving_nodes = frozenset(nodes)
        self._wake()
        return True

    async def absent(self) -> Absent:
        hung, self._hung = tuple(self._hung), []
        return Absent(hung, 0.0 if self._empty_since is None else time.monotonic() - self._empty_since, self._began)

    async def close(self) -> None:
        self._finished = True
        for _, future in self.waiting.values():
            if not future.done():
                future.set_exception(Finished())
        self.waiting = {}

    # Members and newcomers.

    def _remaining(self) -> list[Member]:
        members = self.group.members if self.group else ()
        return [member for member in members if member.name not in self._gone]

    def _is_member(self, name: str) -> bool:
        return any(member.name == name for member in self._remaining())

    def _newcomers(self) -> list[Member]:
        return [member for name, (member, _) in self.waiting.items() if not self._is_member(name)]

    def _joining(self) -> list[Member]:
        """Return the newcomers that enter with the next group, so that it has as many members as are wanted."""
        staying = [member for member in self._remaining() if member.node not in self._leaving_nodes]
        return sorted(self._newcomers(), key=lambda member: member.rank)[: max(0, self._size() - len(staying))]

    def _size(self) -> int:
        # Trainers that end lower `wanted`, to 0 if only spares are left. One of these must train on then.
        return max(1, self.wanted)

    def _orders(self, name: str, number: int) -> Orders:
        if number == 0:
            return Orders()
        if self.group is None or number != self.group.number or not self._is_member(name):
            return Orders(over=True)  # the others have formed another group, or this member was removed
        leaving = {member.name for member in self._remaining() if member.node in self._leaving_nodes}
        over = self.phase is Phase.BROKEN
        return Orders(over=over, meet=bool(leaving or self._joining()), leave=name in leaving)

    # Changes.

    def _change_phase(self, event: Event) -> None:
        self.phase = TRANSITIONS[self.phase, event]

    def _lose(self, name: str, why: str) -> None:
        if self._is_member(name):
            self._gone[name] = why
        self._last_beat.pop(name, None)
        _, future = self.waiting.pop(name, (None, None))
        if future and not future.done():
            future.set_exception(ConnectionError(f"this worker {why}"))

    def _form(self) -> None:
        """Form the next group if all members that it needs wait in `meet`."""
        if self.phase is not Phase.GATHERING and not self._remaining():
            self._change_phase(Event.DESERTED)
            self.group, self._gone, self._empty_since = None, {}, time.monotonic()
        # A dead newcomer would break the new group at its first exchange, and cost all members that step.
        for member in self._joining():
            if self.died(member):
                self._lose(member.name, "died")
        remaining, joining = self._remaining(), self._joining()
        if self.phase is Phase.GATHERING and len(joining) >= self._size():
            self._start_group(joining, begins=True, why="")
        elif remaining and all(member.name in self.waiting for member in remaining):
            self._start_group([*remaining, *joining], begins=False, why=self._why_changed(len(joining)))
        self._wake()

    def _why_changed(self, joining: int) -> str:
        assert self.group is not None
        ranks = {member.name: member.rank for member in self.group.members}
        gone = [f"worker {ranks[name]} {why}" for name, why in self._gone.items()]
        joined = [f"{plural(joining, 'worker')} joined"] if joining else []
        return " and ".join(gone + joined) or "a connection was lost"

    def _start_group(self, members: list[Member], begins: bool, why: str) -> None:
        self._change_phase(Event.FORMED)
        self._number += 1
        self.group, self._empty_since = Group(self._number, tuple(members), begins, why), None
        self._gone, self._began = {}, True
        for member in members:
            _, future = self.waiting.pop(member.name)
            if not future.done():  # a caller that died has cancelled it
                future.set_result(self.group)

    # The watch: runs ten times a second from the first member on.

    def _begin_watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._watch_again()

    def _watch_again(self) -> None:
        # Not a task: asyncio would log a warning about the pending task when the actor ends.
        asyncio.get_running_loop().call_later(0.1, self._watch)

    def _watch(self) -> None:
        """Remove members that are certainly dead, or silent for too long."""
        now, lost = time.monotonic(), dict[str, str]()
        # If this process itself stood still, it could receive no beats, so that time does not count as silence.
        if now - self._last_watch > 1.0:
            self._last_beat = {name: at + now - self._last_watch for name, at in self._last_beat.items()}
        self._last_watch = now
        meeting = bool(self.waiting) or self.phase is Phase.BROKEN
        doubted = []
        for member in [*self._remaining(), *(member for member, _ in self.waiting.values())]:
            silent = now - self._last_beat.get(member.name, now)
            if silent > self.silence:
                lost[member.name] = f"gave no sign of life for {self.silence:.0f} s"
                self._hung.append(member)
            # A member beats every second, so 3 s of silence are a reason to ask Ray whether it is dead. While others
            # wait for it, ask at once: they train nothing until its death is known.
            elif silent > 3.0 or (meeting and member.name not in self.waiting):
                doubted.append(member)
        # Asking takes about a millisecond per member, in the loop that also answers beats. When hundreds are late at
        # once, most of them are alive, so ask for 16 of them per turn.
        for member in random.sample(doubted, min(16, len(doubted))):
            if self.died(member):
                lost[member.name] = "died"
        if any(self._is_member(name) for name in lost):
            self._change_phase(Event.LOST)
        for name, why in lost.items():
            self._lose(name, why)
        if lost:
            self._form()
        self._watch_again()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
