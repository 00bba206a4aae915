"""Placement of a model on the workers: ddp or fsdp.

ddp: every worker holds the whole base. fsdp: FSDP2 shards the blocks of the frozen base; train/sharded_base.py loads
them so that nobody ever holds the whole. What is in no block, embeddings and head above all, is whole on every worker:
each needs it in every step, and gathering it would take room for it twice. In both the adapters are whole on every
worker (they are small) and their gradients are summed once a step in one fixed tree (train/tree.py), so accumulation
needs no `no_sync`, a step has the same bits whatever the number of workers, and a checkpoint is the same file for both.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives
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
    """Shard the blocks of the frozen base; adapters and what is in no block stay whole. Weights may still be meta.

    Each of the copies is spread over workers of consecutive ranks, which Ray gives to the workers of a node.
    `offload`: shards stay in the memory of the node, and are copied to the device each time they are gathered.
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
    blocks = blocks_to_shard(loss.model)
    whole = adapters | outside(loss, blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=adapters, offload_policy=policy)
        loss.offloaded += [block] if apart else []
    fully_shard(loss, mesh=mesh, ignored_params=whole)


def outside(model: nn.Module, blocks: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters that are in none of the blocks."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return {parameter for parameter in model.parameters() if id(parameter) not in inside}


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


def begin_at_root(loss: Any) -> None:
    """Before a part of a sharded base is asked alone: FSDP takes the module that runs first for the root of the whole.

    Then the first loss would fail: an empty method of the root runs first.
    """
    if not hasattr(loss, "unshard"):
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    loss.nothing = lambda: None
    register_fsdp_forward_method(loss, "nothing")
    loss.nothing()
    del loss.nothing
