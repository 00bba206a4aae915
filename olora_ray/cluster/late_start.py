"""The first moment of a worker whose group may change: it begins when that takes nothing from those that train.

A worker that is lost is replaced at once. If a spare has taken its place meanwhile, the replacement is the next spare,
and nobody waits for it; but its imports and the loading of the base would take processors from the step that has to be
done again. So it waits until a step is done, as the first spares do, and nothing that is heavy is imported here: what a
worker works with comes pickled.
"""

from dataclasses import dataclass
from typing import Any

import ray

from olora_ray.cluster.process_group import on_its_device


@dataclass(frozen=True)
class LateStart:
    """What Ray Train calls in a worker."""

    channel: Any
    work: bytes
    """A function of the channel, pickled by Ray's cloudpickle: to unpickle it imports torch."""

    def __call__(self) -> Any:
        """Wait for the moment, then work; returns what the work does, or that nothing was left to do."""
        if not ray.get(self.channel.moment_to_start.remote()):
            from olora_ray.cluster.spec import LEFT, TrainResult

            return TrainResult(interrupted=LEFT)
        with on_its_device():
            return ray.cloudpickle.loads(self.work)(self.channel)
