"""A worker's side of the membership: it meets the others, is connected with them, and hears when a group is over."""

import contextlib
import logging
import threading
import time
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from olora_ray.cluster.groups import Group, Member, Orders
from olora_ray.common import collectives
from olora_ray.common.collectives import PeerLost

logger = logging.getLogger(__name__)

CONNECT = (10, 20, 40, 80, 160)
"""Seconds within which a group has to be connected: one after the other, when others are lost meanwhile."""
PAUSE = 0.2
"""Seconds after orders that are not followed yet, before they are asked for again."""


class Meeting(Protocol):
    """The membership as a worker reaches it (see Membership for each call)."""

    def meet(self, member: Member, lost: bool) -> Group:
        """Wait for the others; the next group."""

    def beat(self, name: str, number: int) -> Orders:
        """A sign of life."""

    def running(self) -> bool:
        """Whether there is a group already."""

    def leave(self, name: str, why: str) -> None:
        """Go."""


class RayMeeting:
    """The membership in the actor of a training's channel."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def meet(self, member: Member, lost: bool) -> Group:
        """See Meeting."""
        try:
            found: Group = ray.get(self.channel.meet.remote(member, lost))
        except RayTaskError as error:
            raise error.cause from None
        return found

    def beat(self, name: str, number: int) -> Orders:
        """See Meeting."""
        found: Orders = ray.get(self.channel.beat.remote(name, number))
        return found

    def running(self) -> bool:
        """See Meeting."""
        return bool(ray.get(self.channel.running.remote()))

    def leave(self, name: str, why: str) -> None:
        """See Meeting."""
        ray.get(self.channel.leave.remote(name, why))


class Mesh:
    """The connections of this process with the others of its group, one group after the other, while it is entered."""

    def __init__(self, meeting: Meeting, member: Member) -> None:
        """`member` is this process."""
        self.meeting, self.member = meeting, member
        self.group: Group | None = None
        self._orders = Orders()
        self._guard = threading.Lock()
        """Of the group and its connections."""
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="membership", daemon=True).start()

    def meet(self, lost: bool = False) -> Group:
        """Leave the group of now and wait for the next one; returns when it is connected.

        Raises Finished if there will be none, and ConnectionError if this worker was given up meanwhile.
        """
        for seconds in CONNECT:
            self._disconnect()
            group = self.meeting.meet(self.member, lost)
            with self._guard:
                self.group, self._orders = group, Orders()
            try:
                if len(group.members) > 1:
                    first, rank = group.members[0], group.rank_of(self.member.name)
                    collectives.join_group(first.store, str(group.number), rank, len(group.members), seconds)
                return group
            except PeerLost:
                lost = True
        raise ConnectionError("the workers cannot be connected")

    def orders(self) -> Orders:
        """What is to be done after the step under way. A local read: may be called every step."""
        return self._orders

    def leads(self) -> bool:
        """Whether this worker is the first of a group, which speaks for it."""
        return self.group is not None and self.group.members[0] == self.member

    def __enter__(self) -> "Mesh":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Go; the others train on without this worker."""
        self._closed.set()
        with contextlib.suppress(RayError):  # the driver is gone
            self.meeting.leave(self.member.name, "failed" if error else "left")
        self._disconnect()

    def _disconnect(self) -> None:
        with self._guard:
            self.group = None
            collectives.leave_group()

    def _listen(self) -> None:
        """Give signs of life; end the exchange that is under way when the group is over."""
        ended = 0
        while not self._closed.is_set():
            number = self.group.number if self.group else 0
            try:
                orders = self.meeting.beat(self.member.name, number)
            except (RayError, OSError, EOFError):  # the driver is gone, and soon this process is
                time.sleep(PAUSE)
                continue
            with self._guard:
                if self.group is None or self.group.number != number:
                    continue
                self._orders = orders
                if orders.over and ended != number:
                    ended = number
                    collectives.abort()
            if orders != Orders():
                self._closed.wait(PAUSE)
