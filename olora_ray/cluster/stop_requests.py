"""How a worker hears that it should end: from the driver over the board, from Ray about its node."""

import contextlib
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayError

from olora_ray.cluster.preemption import Node
from olora_ray.common.errors import UserError

SECONDS_BETWEEN_LINES = 15


class Listener:
    """Asks the board without waiting for its answer; one for each worker."""

    def __init__(self, board: Any, rank: int, node: Node) -> None:
        self.board, self.rank, self.node = board, rank, node
        self.why_driver: str | None = None
        self._answer = board.wish.remote() if rank == 0 else None  # answered when there is a wish
        self._looks = 0
        self._hopeless = False

    def wants_stop(self) -> bool:
        """Whether this worker knows of a reason to end: all end together once one does (StepResult.signal)."""
        if self.rank == 0:
            self._listen()
        return self.why_driver is not None or self.node.going()

    def why(self) -> tuple[str, bool]:
        """The reason, and whether it is a preemption; all workers must ask, after a step with a signal."""
        leaving = self.node.leaving()
        reasons: list[Any] = [self.why_driver]
        if dist.is_initialized():
            dist.broadcast_object_list(reasons, src=0)
        if reasons[0]:
            return str(reasons[0]), False
        return f"node {', '.join(node[:8] for node in leaving) or '?'} is taken away", True

    def waiting(self, shard: int, shards: int) -> None:
        """Called about once a second while a shard of the token store is not there yet.

        Raises UserError when it never will be.
        """
        # Only at the second look: between the two the shard was looked for once more, so that no worker
        # gives up on a shard that another one has found.
        if self._hopeless:
            raise UserError("the preparation of the training data has failed")
        try:
            self._hopeless = bool(ray.get(self.board.hopeless.remote(), timeout=30))
        except RayError:
            self._hopeless = False  # Ray ends the workers of a driver that is gone
        if self.rank == 0 and self._looks % SECONDS_BETWEEN_LINES == 0:
            self.board.put.remote(f"waiting for shard {shard + 1} of {shards} of the token store")
        self._looks += 1

    def _listen(self) -> None:
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            with contextlib.suppress(RayError):  # the board is gone, and with it the driver: Ray ends its workers
                self.why_driver = ray.get(ready[0])
