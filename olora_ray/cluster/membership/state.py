"""State machine of a membership: who takes part in a training, from one group of workers to the next.

docs/architecture.md describes the design. The methods run in one event loop, that of the actor of the training's
channel (cluster/channel.py). Neither torch nor Ray is imported here: Train's controller unpacks objects of this module.
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
    """The training has ended: there will be no other group."""


@dataclass(frozen=True)
class Member:
    """A worker process."""

    name: str
    """Id of its actor: never used again."""
    rank: int
    """Ray's number of the worker, for people."""
    store: tuple[str, int]
    """Host and port of its TCPStore: a group meets at that of its first member."""
    node: str = ""
    """Id of its node."""
    process: int = 0
    """Process id on that node."""
    attempt: int = 0
    """The driver's attempt that started it. Members of an earlier attempt count as dead."""


@dataclass(frozen=True)
class Group:
    """Members that train together; the place of a member is its rank in torch's process group."""

    number: int
    members: tuple[Member, ...]
    begins: bool
    """True if no member has trained before: they begin together, from the newest checkpoint or from nothing."""
    why: str = ""
    """Why the group before ended: `worker 1 died`."""

    def rank_of(self, name: str) -> int:
        """Return the place of a member; raises StopIteration for a stranger."""
        return next(place for place, member in enumerate(self.members) if member.name == name)


@dataclass(frozen=True)
class Absent:
    """Missing members, as the driver has to know them."""

    hung: tuple[Member, ...] = ()
    """Members given up for silence since the last call. Their processes may still run."""
    nobody_for: float = 0.0
    """Seconds since the last member was lost, or since the last newcomer that waits for others came."""
    began: bool = True
    """True if there was a group in this attempt."""


@dataclass(frozen=True)
class Orders:
    """Orders to a member."""

    over: bool = False
    """Break off the exchange under way and meet the others: a member of the group is gone."""
    meet: bool = False
    """Meet the others after this step."""
    leave: bool = False
    """Leave after this step instead of meeting them: the node is going to be taken away."""


class Phase(Enum):
    """Phases of a membership."""

    GATHERING = auto()
    """Nobody trains. Newcomers wait until as many are here as are wanted."""
    TRAINING = auto()
    """A group trains."""
    BROKEN = auto()
    """The group has lost a member or a connection: the members that are left have to meet at once."""


class Event(Enum):
    """What changes the phase."""

    FORMED = auto()
    """All members that the next group needs are here."""
    LOST = auto()
    """A member died, hangs, or cannot reach another one."""
    DESERTED = auto()
    """The last member of the group is gone."""
    RESET = auto()
    """The driver starts other workers."""


TRANSITIONS = {
    (Phase.GATHERING, Event.FORMED): Phase.TRAINING,
    (Phase.TRAINING, Event.FORMED): Phase.TRAINING,  # between two steps: a member joined or left
    (Phase.BROKEN, Event.FORMED): Phase.TRAINING,
    (Phase.TRAINING, Event.LOST): Phase.BROKEN,
    (Phase.BROKEN, Event.LOST): Phase.BROKEN,
    (Phase.TRAINING, Event.DESERTED): Phase.GATHERING,
    (Phase.BROKEN, Event.DESERTED): Phase.GATHERING,
    **{(phase, Event.RESET): Phase.GATHERING for phase in Phase},
}
"""All transitions: every other pair of phase and event is a bug."""


class Membership:
    """Forms the groups."""

    def __init__(self, wanted: int, died: Callable[[Member], bool], silence: float = 20.0) -> None:
        """The first group waits for `wanted` members; later ones take fewer, but never more.

        `died` tells whether a member is certainly gone. It is called often, and must return in milliseconds. A member
        that gives no sign of life for `silence` seconds counts as lost.
        """
        self.wanted, self.died, self.silence, self.attempt = wanted, died, silence, 0
        self.phase = Phase.GATHERING
        self.group: Group | None = None
        """The group that trains; None while GATHERING."""
        self.waiting: dict[str, tuple[Member, asyncio.Future[Group]]] = {}
        """Members and newcomers that wait for the next group."""
        self._number = 0
        self._seen: dict[str, float] = {}
        """Name -> time of the last sign of life."""
        self._gone: dict[str, str] = {}
        """Members of the group that are gone, and why."""
        self._hung: list[Member] = []
        self._empty_since: float | None = None
        """Start of `Absent.nobody_for`; None while there is a group, and before the first newcomer."""
        self._leaving: frozenset[str] = frozenset()
        """Ids of nodes that are going to be taken away."""
        self._began = self._finished = self._watching = False
        self._changed = asyncio.Event()
        self._looked = time.monotonic()

    # What workers call.

    async def meet(self, member: Member, lost: bool = False) -> Group:
        """Wait for the others; returns the next group. `lost`: an exchange with them has failed.

        A newcomer comes in with the next group, or waits until another member is wanted. Raises Finished, and
        ConnectionError if the member was given up meanwhile.
        """
        if self._finished:
            raise Finished
        if member.attempt != self.attempt:
            raise ConnectionError("this worker is of an earlier attempt")
        self._begin_watch()
        self._seen[member.name] = time.monotonic()
        future: asyncio.Future[Group] = asyncio.get_running_loop().create_future()
        self.waiting[member.name] = member, future
        if self.phase is Phase.GATHERING:
            self._empty_since = time.monotonic()  # others may be on their way, too
        elif lost and self._is_member(member.name):
            self._happens(Event.LOST)
        self._form()
        return await future

    async def beat(self, name: str, number: int) -> Orders:
        """Take a sign of life of a member of the group `number` (0: of none); returns its orders.

        Waits up to a second for orders, so that a member hears of a loss at once.
        """
        self._begin_watch()
        end = time.monotonic() + 1.0
        while True:
            self._seen[name] = time.monotonic()
            orders, changed = self._orders(name, number), self._changed
            left = end - time.monotonic()
            if orders != Orders() or left <= 0:
                return orders
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)

    async def leave(self, name: str, why: str) -> None:
        """Let a member go, which has `left` or `failed`."""
        self._lose(name, why)
        self._form()

    async def running(self) -> bool:
        """True if a group trains; a member whose death is not noticed yet counts."""
        return self.phase is not Phase.GATHERING

    async def complete(self) -> bool:
        """True if as many as are wanted train, or wait to: another one would be a spare."""
        found = [*self._present(), *self._newcomers()]
        staying = [member for member in found if member.node not in self._leaving]
        return self.phase is not Phase.GATHERING and len(staying) >= self._size()

    # What the driver calls.

    async def begin_anew(self, wanted: int, attempt: int) -> None:
        """Forget everybody: the driver starts `wanted` other workers."""
        for name in list(self.waiting):
            self._lose(name, "was given up")
        self._happens(Event.RESET)
        self.wanted, self.attempt, self.group = wanted, attempt, None
        self._finished, self._began, self._empty_since = False, False, None
        self._seen, self._gone, self._leaving, self._hung = {}, {}, frozenset(), []

    async def want(self, more: int) -> None:
        """Make later groups larger by `more` members; below 0: smaller, but of one member at least."""
        self.wanted += more
        self._form()

    async def drain_nodes(self, nodes: Collection[str]) -> bool:
        """Have the members on these nodes leave after the step under way; False if no others would be left."""
        if not any(member.node not in nodes for member in self._present()):
            return False
        self._leaving = frozenset(nodes)
        self._wake()
        return True

    async def absent(self) -> Absent:
        """Return who is missing."""
        hung, self._hung = tuple(self._hung), []
        return Absent(hung, 0.0 if self._empty_since is None else time.monotonic() - self._empty_since, self._began)

    async def close(self) -> None:
        """End the membership: the training has ended, and who waits for a group waits for nothing."""
        self._finished = True
        for _, future in self.waiting.values():
            if not future.done():
                future.set_exception(Finished())
        self.waiting = {}

    # Who is here.

    def _present(self) -> list[Member]:
        members = self.group.members if self.group else ()
        return [member for member in members if member.name not in self._gone]

    def _is_member(self, name: str) -> bool:
        return any(member.name == name for member in self._present())

    def _newcomers(self) -> list[Member]:
        return [member for name, (member, _) in self.waiting.items() if not self._is_member(name)]

    def _entering(self) -> list[Member]:
        """Newcomers that come in with the next group: as many as are wanted."""
        staying = [member for member in self._present() if member.node not in self._leaving]
        return sorted(self._newcomers(), key=lambda member: member.rank)[: max(0, self._size() - len(staying))]

    def _size(self) -> int:
        """Return how many members a group is to have: spares may train while nobody else is wanted."""
        return max(1, self.wanted)

    def _orders(self, name: str, number: int) -> Orders:
        if number == 0:
            return Orders()
        if self.group is None or number != self.group.number or not self._is_member(name):
            return Orders(over=True)  # it has missed the meeting, or was given up
        leaving = {member.name for member in self._present() if member.node in self._leaving}
        over = self.phase is Phase.BROKEN
        return Orders(over=over, meet=bool(leaving or self._entering()), leave=name in leaving)

    # Changes.

    def _happens(self, event: Event) -> None:
        self.phase = TRANSITIONS[self.phase, event]

    def _lose(self, name: str, why: str) -> None:
        """Give up a member or a newcomer."""
        if self._is_member(name):
            self._gone[name] = why
        self._seen.pop(name, None)
        _, future = self.waiting.pop(name, (None, None))
        if future and not future.done():
            future.set_exception(ConnectionError(f"this worker {why}"))

    def _form(self) -> None:
        """Form the next group if all are here that it needs, and let everybody hear of what has changed."""
        if self.phase is not Phase.GATHERING and not self._present():  # newcomers begin anew
            self._happens(Event.DESERTED)
            self.group, self._gone, self._empty_since = None, {}, time.monotonic()
        for member in self._entering():
            if self.died(member):
                self._lose(member.name, "died")
        present, come = self._present(), self._entering()
        if self.phase is Phase.GATHERING and len(come) >= self._size():
            self._set(come, begins=True, why="")
        elif present and all(member.name in self.waiting for member in present):
            self._set([*present, *come], begins=False, why=self._why(len(come)))
        self._wake()

    def _why(self, come: int) -> str:
        assert self.group is not None
        ranks = {member.name: member.rank for member in self.group.members}
        gone = [f"worker {ranks[name]} {why}" for name, why in self._gone.items()]
        return " and ".join(gone + ([f"{plural(come, 'worker')} joined"] if come else [])) or "a connection was lost"

    def _set(self, members: list[Member], begins: bool, why: str) -> None:
        self._happens(Event.FORMED)
        self._number += 1
        self.group, self._empty_since = Group(self._number, tuple(members), begins, why), None
        self._gone, self._began = {}, True
        for member in members:
            _, future = self.waiting.pop(member.name)
            if not future.done():  # the caller is gone
                future.set_result(self.group)

    # The watch: every tenth of a second, from the first member on.

    def _begin_watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._watch_again()

    def _watch_again(self) -> None:
        # No task: asyncio complains of one that is pending when the actor ends.
        asyncio.get_running_loop().call_later(0.1, self._watch)

    def _watch(self) -> None:
        """Give up members that are certainly gone, or silent for too long."""
        now, lost = time.monotonic(), dict[str, str]()
        if now - self._looked > 1.0:  # this process stood still: nobody could be heard
            self._seen = {name: seen + now - self._looked for name, seen in self._seen.items()}
        self._looked = now
        meeting = bool(self.waiting) or self.phase is Phase.BROKEN
        doubted = []
        for member in [*self._present(), *(member for member, _ in self.waiting.values())]:
            silent = now - self._seen.get(member.name, now)
            if silent > self.silence:
                lost[member.name] = f"gave no sign of life for {self.silence:.0f} s"
                self._hung.append(member)
            # A member beats every second. Others that wait for it are reason enough to ask whether it has died.
            elif silent > 3.0 or (meeting and member.name not in self.waiting):
                doubted.append(member)
        # Of hundreds that are missed at once most are only late, and asking takes a millisecond each.
        for member in random.sample(doubted, min(16, len(doubted))):
            if self.died(member):
                lost[member.name] = "died"
        if any(self._is_member(name) for name in lost):
            self._happens(Event.LOST)
        for name, why in lost.items():
            self._lose(name, why)
        if lost:
            self._form()
        self._watch_again()

    def _wake(self) -> None:
        """Wake all `beat` calls that wait for orders."""
        self._changed.set()
        self._changed = asyncio.Event()
