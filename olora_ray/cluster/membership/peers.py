"""A worker's side of the membership: meet the others, connect with them, take the state of whoever is furthest."""

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
"""Calls a method of the Membership: its name, and the arguments."""


def through(channel: Any) -> Call:
    """Return the way to the membership in the actor of a training's channel."""

    def call(name: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(channel, name).remote(*arguments))
        except RayTaskError as error:
            raise error.cause from None

    return call


class Peers:
    """Connections of this process with the others of its group, one group after the other. Entered: it is a member."""

    def __init__(self, call: Call, member: Member) -> None:
        """`member` is this process."""
        self.call, self.member = call, member
        self.group: Group | None = None
        self._orders = Orders()
        self._guard = threading.Lock()
        """Of the group and its connections."""
        self._closed = threading.Event()

    def __enter__(self) -> "Peers":
        threading.Thread(target=self._listen, name="membership", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Leave; the others train on without this worker."""
        self._closed.set()
        with contextlib.suppress(RayError):  # the driver is gone
            self.call("leave", self.member.name, "failed" if error else "left")
        self._disconnect()

    def running(self) -> bool:
        """True if a group trains already."""
        return bool(self.call("running"))

    def next_group(self, lost: bool = False) -> Group:
        """Leave this group and wait for the next one; returns when it is connected.

        Raises Finished if there will be none, and ConnectionError if this worker was given up meanwhile.
        """
        for seconds in (10, 20, 40, 80, 160):  # to connect: others may be lost meanwhile, so not long at first
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
        raise ConnectionError("the workers cannot be connected")

    def orders(self) -> Orders:
        """Return the orders for after the step under way. A local read: may be called every step."""
        return self._orders

    def leads(self) -> bool:
        """True if this worker is the first of a group, which speaks for it."""
        return self.group is not None and self.group.members[0] == self.member

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
                orders: Orders = self.call("beat", self.member.name, number)
            except (RayError, OSError, EOFError):  # the driver is gone, and soon this process is
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
                self._closed.wait(0.2)  # the orders are not followed yet: `beat` would return at once


# The state of a training goes from the worker that is furthest to all others of a new group. When a group breaks, some
# members may have done a step or an evaluation that others have not; a newcomer comes from a checkpoint. Since all
# compute the same, workers that are equally far have the same state.


@dataclass
class Progress:
    """Progress of a worker between two steps, beside its tensors."""

    state: TrainState
    pending: StepResult | None = None
    """The step that is done, and neither evaluated nor told."""
    torn: bool = False
    """True if the tensors are a mixture: another worker's did not arrive as a whole."""

    def mark(self) -> tuple[int, int]:
        """Return a mark that grows with each step and each row that is told."""
        return TORN if self.torn else (self.state.step, len(self.state.history))


TORN = (-1, 0)
"""The mark of a state with which nobody may go on."""


class HasBest(Protocol):
    """The part of an Evaluator that is state."""

    best: Tensor | None


def sync_state(here: Progress, trainer: Trainer, evaluator: HasBest) -> Progress:
    """Give all of a group the state of the furthest, adapter and optimizer included; all must call it together.

    Returns the common progress. Raises PeerLost, after which it is to be called again in the next group, and
    RuntimeError if nobody has a whole state: the only worker that had it was lost while it gave it to the others.
    """
    marks = collectives.gather(here.mark())
    furthest = max(marks)
    if furthest == TORN:
        raise RuntimeError("no worker is left that has the state of the training")
    if min(marks) == furthest:
        return here
    source = marks.index(furthest)
    own = collectives.rank() == source
    found: Any = collectives.from_one((here, evaluator.best is not None) if own else None, source)
    progress, has_best = found
    here.torn = not own  # until all of it is here
    flat = trainer.flat
    if not has_best:
        evaluator.best = None
    elif not own:
        # Not in place: a thread that writes a checkpoint may still read the tensor of before.
        evaluator.best = torch.empty_like(flat.vector)
    best = [] if evaluator.best is None else [evaluator.best]
    for tensor in [flat.vector, *trainer.optimizer.moments.values(), *best]:
        collectives.broadcast_in_place(tensor, source)
    trainer.optimizer.at(progress.state.step)
    return here if own else progress
