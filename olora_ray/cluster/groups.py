"""Who takes part in a training, and what its membership tells them (membership.py)."""

from dataclasses import dataclass


class Finished(Exception):
    """The training has ended: there will be no other group."""


@dataclass(frozen=True)
class Member:
    """A worker process."""

    name: str
    """Of this process, never used again: the id of its actor."""
    rank: int
    """Ray's number of it, for people."""
    store: tuple[str, int]
    """Host and port of its TCPStore, at which a group meets whose first member it is."""
    node: str = ""
    """Id of its node."""
    process: int = 0
    """Its number there."""
    attempt: int = 0
    """Which attempt of the driver has started it: those of an earlier one are as good as dead."""


@dataclass(frozen=True)
class Group:
    """Those that take part for a time; their places are the ranks."""

    number: int
    members: tuple[Member, ...]
    begins: bool
    """Whether none of them has trained before: they begin together, from the newest checkpoint or from nothing."""
    why: str = ""
    """What has ended the one before: `worker 1 died`."""

    def rank_of(self, name: str) -> int:
        """The place of a member; raises StopIteration for a stranger."""
        return next(place for place, member in enumerate(self.members) if member.name == name)


@dataclass(frozen=True)
class Absent:
    """Who is missing, as the driver has to know it."""

    hung: tuple[Member, ...] = ()
    """Members that were given up since the last time this was asked, and may still hold their places."""
    nobody_for: float = 0.0
    """Seconds since the last member of a group was lost, or since one that waits for others has come."""
    began: bool = True
    """Whether there was a group before."""


@dataclass(frozen=True)
class Orders:
    """What a member has to do."""

    over: bool = False
    """A member of its group is gone: end the exchange that is under way, and meet the others."""
    meet: bool = False
    """Meet the others after this step."""
    leave: bool = False
    """Leave after this step instead of meeting them: its node is going to be taken away."""
