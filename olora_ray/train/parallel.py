"""Placement of a model on the workers: ddp or fsdp.

ddp: every worker holds the whole base. fsdp: FSDP2 shards the frozen base, layer by layer. In both the
adapters are whole on every worker (they are small) and their gradients are summed by one flat
all-reduce per step (train/optim.py), so accumulation needs no `no_sync`, a step has the same bits for
the same workers, and a checkpoint is the same file for both.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.common import collectives
from olora_ray.tokens.collate import Batch
from olora_ray.train import recompute
from olora_ray.train.blocks import decoder_layers
from olora_ray.train.loss import SupervisedLoss


def place_model(loss: SupervisedLoss, strategy: str, device: torch.device) -> None:
    """Move the model to `device`, and shard the frozen base over the workers for "fsdp".

    May be called again with adapters in place: a base that is sharded stays so.
    """
    recompute.install(loss)
    if strategy == "fsdp" and collectives.world_size() > 1 and not hasattr(loss, "unshard"):
        _shard(loss, device)
    # Sharding moves the base; adapters and buffers are ignored by it.
    loss.to(device)


def _shard(loss: SupervisedLoss, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    adapters = {
        parameter
        for module in loss.modules()
        if isinstance(module, AdaptedWeight)
        for parameter in (module.da, module.db)
    }
    for layer in decoder_layers(loss.model):
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    fully_shard(loss, mesh=mesh, ignored_params=adapters)


def strategy_problem(strategy: str) -> str | None:
    """Why this torch cannot place a model so; None if it can. Nothing but fsdp needs the newest that is used here."""
    from torch.distributed.fsdp import fully_shard

    if strategy == "fsdp" and "ignored_params" not in inspect.signature(fully_shard).parameters:
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
