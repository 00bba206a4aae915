"""Placement of a model on the workers: ddp or fsdp.

ddp: every worker holds the whole base. fsdp: FSDP2 shards the frozen base, block by block; train/sharded_base.py
loads it so that nobody ever holds the whole. In both the adapters are whole on every worker (they are small) and their
gradients are summed once a step in one fixed tree (train/tree.py), so accumulation needs no `no_sync`, a step has the
same bits whatever the number of workers, and a checkpoint is the same file for both.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives
from olora_ray.tokens.collate import Batch
from olora_ray.train import recompute
from olora_ray.train.blocks import blocks_to_shard
from olora_ray.train.loss import SupervisedLoss

if TYPE_CHECKING:  # it takes as long as a quarter of torch
    from torch.distributed.tensor import DTensor


def place_model(
    loss: SupervisedLoss, strategy: str, device: torch.device, replicas: int = 1, offload: bool = False
) -> None:
    """Move the model to `device`, and shard the frozen base over the workers for "fsdp", `replicas` and `offload` as of
    `shard`.

    May be called again with adapters in place: a base that is sharded stays so.
    """
    recompute.install(loss)
    if strategy == "fsdp" and collectives.world_size() > 1 and not hasattr(loss, "unshard"):
        shard(loss, device, replicas, offload)
    # Sharding moves the base; adapters and buffers are ignored by it.
    root: Any = loss  # torch leaves `_apply` untyped
    place = places(loss, device)
    root._apply(lambda part: part.to(place(part)))


def places(loss: Any, device: torch.device) -> Callable[[Tensor], torch.device]:
    """Where a parameter or buffer of the model belongs: on `device`, but for shards of offloaded blocks.

    Module.to would move these too, and FSDP then refuses to run.
    """
    from torch.distributed.tensor import DTensor

    for block in loss.offloaded:
        block.reshard()
    stay = {id(part) for block in loss.offloaded for part in block.parameters() if isinstance(part, DTensor)}
    return lambda part: torch.device("cpu") if id(part) in stay else device


def shard(loss: SupervisedLoss, device: torch.device, replicas: int = 1, offload: bool = False) -> None:
    """Shard the frozen base; adapters stay whole. Weights may still be on the meta device.

    Each of the copies is spread over workers of consecutive ranks, which Ray gives to the workers of a node.
    `offload`: shards of blocks stay in the memory of the node, and are copied to the device each time they are
    gathered; what is in no block is on the device all the same, for as long as a step takes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    world = collectives.world_size()
    shape, names = ((world,), ("shards",)) if replicas == 1 else ((replicas, world // replicas), ("copies", "shards"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    adapters = {
        parameter
        for module in loss.modules()
        if isinstance(module, AdaptedWeight)
        for parameter in (module.da, module.db)
    }
    apart = offload and has_own_memory(device)
    # Pinned memory is copied to a GPU while it computes.
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if apart else OffloadPolicy()
    for block in blocks_to_shard(loss.model):
        fully_shard(block, mesh=mesh, ignored_params=adapters, offload_policy=policy)
        loss.offloaded += [block] if apart else []
    fully_shard(loss, mesh=mesh, ignored_params=adapters)


def has_own_memory(device: torch.device) -> bool:
    """Whether its tensors lie elsewhere than in the memory of the node."""
    return device.type != "cpu"


def own_rows(parameter: "DTensor") -> tuple[int, int]:
    """The rows first..last of a sharded parameter that this worker has; none where there are fewer rows than workers.

    As torch.chunk cuts them: all parts but the last have the same size.
    """
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    size = math.ceil(rows / mesh.size(-1))
    first = min(size * mesh.get_local_rank(mesh.ndim - 1), rows)
    return first, min(first + size, rows)


def strategy_problem(strategy: str) -> str | None:
    """Why this torch cannot place a model so; None if it can. Nothing but fsdp needs the newest that is used here."""
    if strategy != "fsdp":
        return None
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        return (
            f"cluster.strategy: fsdp needs torch 2.7 or newer, this is {torch.__version__}; upgrade torch on all nodes,"
            " or set it to ddp"
        )
    return None


@contextmanager
def gathered(loss: Any, batch: Batch) -> Iterator[None]:
    """Of a sharded base, embeddings and head are gathered; its blocks gather themselves."""
    if not hasattr(loss, "unshard"):
        yield
        return
    with torch.no_grad():
        loss(batch)  # FSDP must meet its root first
    loss.unshard()
    try:
        yield
    finally:
        loss.reshard()
