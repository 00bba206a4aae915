"""The config's section `cluster`: the workers."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.config.field_types import PositiveInt
from olora_ray.config.section import Section


class Cluster(Section):
    """Workers: how many, with what, and what happens when one fails."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """Training processes; [min, max]: at least min, and up to max as the cluster has room for them."""
    resize_interval: Annotated[float, Field(gt=0.0)] = 60.0
    """With [min, max] workers: seconds between checks whether more of them fit in the cluster; at most 10 where they
    join without a restart of the others."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0.0, le=1.0)] = "auto"
    """GPUs per worker; auto: 1 if the cluster has GPUs, else 0. A fraction leaves the rest of a GPU to other runs and
    trials; 0.5 or less needs workers=1, since NCCL does not connect workers that share a GPU."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1
    """CPUs per worker, and its number of threads."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds the whole base model; fsdp: each reads and holds a part of it."""
    fsdp_replicas: PositiveInt = 1
    """With fsdp: copies of the base model, each over workers / fsdp_replicas workers; for several nodes that are fast
    inside, the number of nodes: then weights never travel between them."""
    fsdp_offload: bool = False
    """With fsdp, on GPUs: blocks of the base model lie in the memory of the node, and are copied to the GPU as they are
    needed: room there for a longer step, the same result."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts after failures before the run gives up; -1: no limit. Preempted nodes do not count."""
    spares: Annotated[int, Field(ge=0)] = 0
    """Processes that stand by with the base model loaded and take the place of workers that die; with ddp on CPUs,
    where they take memory and no time."""

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: object) -> object:
        numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if not whole or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise ValueError(f"expected a number of workers, or [min, max] with 1 <= min <= max, not {value!r}")
        return value

    @field_validator("gpus_per_worker", mode="before")
    @classmethod
    def _one_gpu_at_most(cls, value: object) -> object:
        if isinstance(value, int | float) and value > 1:
            raise ValueError(
                f"a worker computes on one GPU, of {value:g} the others would be idle; use 1, and more workers"
            )
        return value

    @model_validator(mode="after")
    def _sharded_if_offloaded(self) -> "Cluster":
        if self.fsdp_offload and self.strategy != "fsdp":
            raise ValueError(
                f"fsdp_offload=true with strategy={self.strategy}: only a sharded base is; use strategy=fsdp"
            )
        return self

    def may_share_gpus(self) -> bool:
        """Whether Ray may put several workers on one GPU."""
        gpus = self.gpus_per_worker
        return isinstance(gpus, float) and 0 < gpus <= 0.5 and self.max_workers() > 1

    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.min_workers() < self.max_workers()

    def min_workers(self) -> int:
        """Workers without which training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    def max_workers(self) -> int:
        """Workers that are used at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]
