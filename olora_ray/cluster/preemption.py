"""Preemption of the nodes that a training runs on, as Ray Train announces it."""

import contextlib
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from olora_ray.cluster import ray_internals
from olora_ray.cluster.membership.peers import Peers
from olora_ray.common import collectives
from olora_ray.common.errors import UserError


class Preemption(Protocol):
    """Source of preemption notices for a training process."""

    def announced(self) -> bool:
        """True once Ray has announced a preemption. A local read: may be called every step."""

    def node_ids(self) -> tuple[str, ...]:
        """Ids of the preempted nodes. A barrier: all workers of a trainer of Ray must call it together."""


class RayPreemption:
    """Notices of Ray Train, for one of its workers."""

    def announced(self) -> bool:
        """See Preemption."""
        return ray_internals.preemption_noted()

    def node_ids(self) -> tuple[str, ...]:
        """See Preemption."""
        import ray.train

        info = ray.train.get_preemption_info()
        return tuple(info.preempted_node_ids) if info else ()


class NoPreemption:
    """No notices: a process outside Ray Train learns of a preemption when it dies."""

    def announced(self) -> bool:
        """See Preemption."""
        return False

    def node_ids(self) -> tuple[str, ...]:
        """See Preemption."""
        return ()


# Requests to end or to change the group as a worker sees them: from the driver, from Ray when its node is preempted,
# and from the membership.


SECONDS_BETWEEN_LINES = 15


class HasRank(Protocol):
    """What is needed of a WorkerContext."""

    @property
    def rank(self) -> int:
        """Of this worker, in the group of now."""

    preemption: Preemption


class StopRequests:
    """Listens for stop requests between two steps, without waiting; one per worker."""

    def __init__(self, channel: Any, worker: HasRank, peers: Peers | None = None) -> None:
        self.channel, self.worker, self.peers = channel, worker, peers
        self.from_driver: str | None = None
        self._answer: Any = None  # of a call that is answered when the driver asks to stop
        self._looks = 0
        self._data_failed = False

    def pending(self) -> bool:
        """Whether this worker knows of a reason to end or to meet: all do, once one does (StepResult.signal)."""
        if self.worker.rank == 0:
            self._listen()
        meet = self.peers is not None and self.peers.orders().meet
        return meet or self.from_driver is not None or self.worker.preemption.announced()

    def decided(self) -> bool:
        """Whether the training is to end, not only the group to change; all must ask after a step with a signal."""
        return self.peers is None or collectives.from_first(self.from_driver) is not None

    def reason(self) -> tuple[str, bool]:
        """The reason, and whether it is a preemption; all workers must ask, after a step with a signal."""
        # Where workers come and go the driver looks for such nodes, and asks: Ray's answer is a barrier of all workers
        # that a trainer has started, and would wait for ever for one that is being replaced, or has left.
        preempted = () if self.peers else self.worker.preemption.node_ids()
        if asked := collectives.from_first(self.from_driver):
            return asked, False
        return f"node {', '.join(node[:8] for node in preempted) or '?'} is preempted", True

    def waiting(self, shard: int, shards: int) -> None:
        """Called about once a second while a shard of the token store is not there yet.

        Raises UserError when it never will be.
        """
        # A worker gives up at its second look only: between the two it has looked for the shard once more, so
        # that it does not give up on one that another worker has found and trains on.
        if self._data_failed:
            raise UserError("the preparation of the training data has failed")
        try:
            self._data_failed = bool(ray.get(self.channel.data_failed.remote(), timeout=30))
        except RayError:
            self._data_failed = False  # Ray ends the workers of a driver that is gone
        if self.worker.rank == 0 and self._looks % SECONDS_BETWEEN_LINES == 0:
            self.channel.send.remote(f"waiting for shard {shard + 1} of {shards} of the token store")
        self._looks += 1

    def _listen(self) -> None:
        if self._answer is None:
            self._answer = self.channel.wait_for_stop.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            with contextlib.suppress(RayError):  # the channel is gone, and with it the driver: Ray ends its workers
                self.from_driver = ray.get(ready[0])
