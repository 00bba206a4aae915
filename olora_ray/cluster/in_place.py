"""Groups of Ray Train in which a worker is replaced while the others train on."""

import contextlib
from typing import Any

from ray.train.backend import Backend

from olora_ray.cluster.process_group import ProcessGroup
from olora_ray.cluster.resources import Resources
from olora_ray.config.schema import Config


class InPlaceBackend(Backend):
    """Ray replaces a worker that failed and leaves the rest alone; the workers connect by themselves (mesh.py)."""

    # Ray 2.60, train/v2/_internal/execution/controller: meant for torchft, and read from the backend's class.
    has_replica_groups = True
    share_cuda_visible_devices = True


class InPlaceGroups(ProcessGroup):
    """As ProcessGroup, but none is made for the workers."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See BackendConfig."""
        return InPlaceBackend

    @property
    def train_func_context(self) -> Any:
        """See BackendConfig; a worker enters its device's later (LateStart), since that imports torch."""
        return contextlib.nullcontext


def in_place(config: Config, worker: Resources) -> bool:
    """Whether the workers of a training may change while it runs.

    Each must hold the whole base, and be connected over gloo: NCCL's collectives would have to be ended differently.
    """
    return config.cluster.strategy == "ddp" and "GPU" not in worker
