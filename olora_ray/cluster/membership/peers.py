"""The worker's side of a membership: meet the other members, connect with them, and copy the state of the furthest."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from olora_ray.cluster.membership.state import Group, Member, Orders
from olora_ray.common import collectives
from olora_ray.common.collectives import PeerLost
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loop import StepResult, Trainer

logger = logging.getLogger(__name__)

Call = Callable[..., Any]
"""Function that calls a method of the Membership, by its name and arguments."""


def through(channel: Any) -> Call:
    def call(name: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(channel, name).remote(*arguments))
        except RayTaskError as error:
            raise error.cause from None

    return call


class Peers:
    """Connections of this process (`member`) with the other members of its group; each new group replaces them.

    While the context is entered, a thread sends beats to the membership and takes its orders.
    """

    def __init__(self, call: Call, member: Member) -> None:
        self.call, self.member = call, member
        self.group: Group | None = None
        self._orders = Orders()
        # Two threads change the group and its connections: the one that trains, and the one that listens.
        self._guard = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> "Peers":
        threading.Thread(target=self._listen, name="membership", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._closed.set()
        with contextlib.suppress(RayError):  # the channel is unreachable: the driver has ended
            self.call("leave", self.member.name, "failed" if error else "left")
        self._disconnect()

    def running(self) -> bool:
        return bool(self.call("running"))

    def next_group(self, lost: bool = False) -> Group:
        """Disconnect from this group, wait for the next one, and connect with it.

        `lost`: an exchange in this group has failed. Raises Finished if no group will form any more, and
        ConnectionError if the membership has removed this worker.
        """
        # A member may die while the others connect with it. The first timeout is short, so that they soon meet
        # without it; it doubles because a slow network may need more.
        for seconds in (10, 20, 40, 80, 160):
            self._disconnect()
            group: Group = self.call("meet", self.member, lost)
            with self._guard:
                self.group, self._orders = group, Orders()
            try:
                if len(group.members) > 1:
                    first, rank = group.members[0], group.rank_of(self.member.name)
                    collectives.join_group(first.store, str(group.number), rank, len(group.members), seconds)
                return group
            except PeerLost:
                lost = True
        raise ConnectionError("this worker cannot connect with the other workers")

    def orders(self) -> Orders:
        """Return the orders for the end of the current step, without a call to the membership."""
        return self._orders

    def leads(self) -> bool:
        """True if this worker has rank 0 in its group. Only rank 0 sends log lines to the driver."""
        return self.group is not None and self.group.members[0] == self.member

    def _disconnect(self) -> None:
        with self._guard:
            self.group = None
            collectives.leave_group()

    def _listen(self) -> None:
        """Send beats; when the group is over, abort the exchange in which the training thread waits."""
        ended = 0
        while not self._closed.is_set():
            number = self.group.number if self.group else 0
            try:
                orders: Orders = self.call("beat", self.member.name, number)
            except (RayError, OSError, EOFError):  # the driver has ended, so Ray soon ends this process
                time.sleep(0.2)
                continue
            with self._guard:
                if self.group is None or self.group.number != number:
                    continue
                self._orders = orders
                if orders.over and ended != number:
                    ended = number
                    collectives.abort()
            if orders != Orders():
                self._closed.wait(0.2)  # until the training thread follows the orders, `beat` returns at once


# In a new group, the member that is furthest sends its state to all others. When a group breaks, some members may have
# done a step or an evaluation that others have not, and a newcomer starts from an older checkpoint. All members compute
# the same bytes, so members with the same mark have the same state, and any of them may be the source.


@dataclass
class Progress:
    """Progress of a worker between two steps, without its tensors."""

    state: TrainState
    pending: StepResult | None = None
    """The last step, if it is not yet evaluated and reported."""
    torn: bool = False
    """True if the tensors mix two states: the transfer from the furthest member broke off."""

    def mark(self) -> tuple[int, int]:
        """Return a number that grows with each step and each reported row; TORN for a torn state."""
        return TORN if self.torn else (self.state.step, len(self.state.history))


TORN = (-1, 0)
"""Mark of a torn state. It is the lowest, so such a member never becomes the source."""


class HasBest(Protocol):
    best: Tensor | None


def sync_state(here: Progress, trainer: Trainer, evaluator: HasBest) -> Progress:
    """Copy the state of the furthest member, with adapter and optimizer, to all others; return the common progress.

    All members of the group must call it together. Raises PeerLost if a member is lost; call it again in the next
    group. Raises RuntimeError if every state is torn: the only source was lost during its transfer.
    """
    marks = collectives.gather(here.mark())
    furthest = max(marks)
    if furthest == TORN:
        raise RuntimeError("no remaining worker has a complete state of the training")
    if min(marks) == furthest:
        return here
    source = marks.index(furthest)
    own = collectives.rank() == source
    sent: Any = collectives.from_one((here, evaluator.best is not None) if own else None, source)
    progress, has_best = sent
    here.torn = not own  # until all tensors have arrived
    flat = trainer.flat
    if not has_best:
        evaluator.best = None
    elif not own:
        # A new tensor: the thread that writes a checkpoint may still read the previous one.
        evaluator.best = torch.empty_like(flat.vector)
    best = [] if evaluator.best is None else [evaluator.best]
    for tensor in [flat.vector, *trainer.optimizer.moments.values(), *best]:
        collectives.broadcast_in_place(tensor, source)
    trainer.optimizer.at(progress.state.step)
    return here if own else progress
