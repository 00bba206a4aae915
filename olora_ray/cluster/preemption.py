"""What a training process learns of the node it runs on, from Ray Train or from nobody."""

from typing import Protocol

from olora_ray.cluster import ray_internals


class Preemption(Protocol):
    """The node of a training process."""

    def announced(self) -> bool:
        """Whether it is known here that a worker's node is about to be taken away; cheap."""

    def node_ids(self) -> tuple[str, ...]:
        """Ids of the nodes that are taken away; all workers must ask together."""


class RayPreemption:
    """The node of a worker of Ray Train."""

    def announced(self) -> bool:
        """See Preemption."""
        return ray_internals.preemption_noted()

    def node_ids(self) -> tuple[str, ...]:
        """See Preemption."""
        import ray.train

        info = ray.train.get_preemption_info()
        return tuple(info.preempted_node_ids) if info else ()


class NoPreemption:
    """A node of which nothing is known in advance."""

    def announced(self) -> bool:
        """See Preemption."""
        return False

    def node_ids(self) -> tuple[str, ...]:
        """See Preemption."""
        return ()
