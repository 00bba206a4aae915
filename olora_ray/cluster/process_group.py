"""The process group of a training's workers: Ray's own, set up from a controller that does not import torch.

Ray's TorchConfig has the controller of a training import torch before it can start a worker, about half of the time
that the controller takes until then. The group itself is what Ray makes; the controller only asks the workers for it.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from olora_ray.cluster import ray_internals

logger = logging.getLogger(__name__)

END = 30.0
"""Seconds that workers have to leave their group, as Ray gives them."""


@contextlib.contextmanager
def on_its_device() -> Iterator[None]:
    """The context of a worker's training: torch computes on its device, as under Ray's TorchConfig."""
    from ray.train.torch import TorchConfig

    with TorchConfig().train_func_context():
        yield


class ProcessGroups(Backend):
    """Has the workers of a group meet before they train, and part afterwards; runs in the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """See Backend."""
        place = worker_group.execute_single(0, ray_internals.meeting_place)
        asked = [
            worker_group.execute_single_async(
                rank, ray_internals.join_process_group, backend_config.backend, rank, len(worker_group), place
            )
            for rank in range(len(worker_group))
        ]
        ray.get(asked)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """See Backend."""
        asked = worker_group.execute_async(ray_internals.leave_process_group, len(worker_group) > 1)
        try:
            ray.get(asked, timeout=END)
        except GetTimeoutError:
            logger.warning(f"workers did not leave their process group within {END:g} s")


@dataclass
class ProcessGroup(BackendConfig):
    """In place of Ray's TorchConfig."""

    backend: str | None = None
    """nccl or gloo; TorchTrainer says which."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See BackendConfig."""
        return ProcessGroups

    @property
    def train_func_context(self) -> Any:
        """See BackendConfig."""
        return on_its_device
