"""Groups of Ray Train in which a worker is replaced while the others train on."""

from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from olora_ray.cluster.resources import Resources
from olora_ray.config.schema import Config


class _InPlaceBackend(Backend):
    """Ray replaces a worker that failed and leaves the rest alone; the workers connect by themselves (mesh.py)."""

    # Ray 2.60, train/v2/_internal/execution/controller: meant for torchft, and read from the backend's class.
    has_replica_groups = True
    share_cuda_visible_devices = True


class InPlaceConfig(TorchConfig):
    """As TorchConfig, without a process group of Ray's."""

    @property
    def backend_cls(self) -> Any:
        """See BackendConfig."""
        return _InPlaceBackend


def in_place(config: Config, worker: Resources) -> bool:
    """Whether the workers of a training may change while it runs.

    Each must hold the whole base, and be connected over gloo: NCCL's collectives would have to be ended differently.
    """
    return config.cluster.strategy == "ddp" and "GPU" not in worker
