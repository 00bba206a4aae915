"""Stop requests as a worker sees them: from the driver, or from Ray when its node is preempted."""

import contextlib
from typing import Any

import ray
from ray.exceptions import RayError

from olora_ray.cluster.preemption import Preemption
from olora_ray.common import collectives
from olora_ray.common.errors import UserError

SECONDS_BETWEEN_LINES = 15


class StopRequests:
    """Listens for stop requests between two steps, without waiting; one per worker."""

    def __init__(self, channel: Any, rank: int, preemption: Preemption) -> None:
        self.channel, self.rank, self.preemption = channel, rank, preemption
        self.from_driver: str | None = None
        self._answer = channel.wait_for_stop.remote() if rank == 0 else None  # answered when the driver asks to stop
        self._looks = 0
        self._data_failed = False

    def pending(self) -> bool:
        """Whether this worker knows of a reason to end: all end together once one does (StepResult.signal)."""
        if self.rank == 0:
            self._listen()
        return self.from_driver is not None or self.preemption.announced()

    def reason(self) -> tuple[str, bool]:
        """The reason, and whether it is a preemption; all workers must ask, after a step with a signal."""
        preempted = self.preemption.node_ids()
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
        if self.rank == 0 and self._looks % SECONDS_BETWEEN_LINES == 0:
            self.channel.send.remote(f"waiting for shard {shard + 1} of {shards} of the token store")
        self._looks += 1

    def _listen(self) -> None:
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            with contextlib.suppress(RayError):  # the channel is gone, and with it the driver: Ray ends its workers
                self.from_driver = ray.get(ready[0])
