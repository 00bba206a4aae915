"""Preemption of the nodes that a training runs on, as Ray Train announces it."""

from typing import Protocol

from olora_ray.cluster import ray_internals


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
