"""A base that no worker ever holds whole: built without weights, sharded, and filled from its files, rows by rows.

Weights of one dimension (norms, biases) are read by every worker: they are small, and some norms are looked at before
the base is sharded (train/fast_norm.py).
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model.load import empty_model
from olora_ray.train import base_files
from olora_ray.train.base_files import BaseFiles
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import has_own_memory, own_rows, places, shard
from olora_ray.train.quantised_base import load_frozen

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

AT_ONCE = 2**26
"""Bytes of a parameter that are read at once, or one of its rows."""


def load_base(folder: str, config: Config, device: torch.device) -> SupervisedLoss:
    """The frozen base of a worker: sharded if the config says so, there are several, and its files can be read so.

    All workers must call it together. Raises UserError as `load_frozen`.
    """
    if config.cluster.strategy != "fsdp" or collectives.world_size() == 1:
        return SupervisedLoss(together(lambda: load_frozen(folder, config.model, device)))
    if config.cluster.fsdp_offload and not has_own_memory(device):
        logger.info("cluster.fsdp_offload: without a GPU the base lies in the memory of the node as it is")
    began = time.perf_counter()
    loss = _sharded(folder, config, device)
    if isinstance(loss, str):
        logger.info(f"fsdp: each worker loads the whole base before it is sharded: {loss}")
        return SupervisedLoss(together(lambda: load_frozen(folder, config.model, device)))
    logger.info(f"fsdp: each worker has read its part of the base, in {time.perf_counter() - began:.2f} s")
    return loss


def _sharded(folder: str, config: Config, device: torch.device) -> SupervisedLoss | str:
    """The base with this worker's part of it, or why its files cannot be read by rows; the same on all workers."""
    model = together(lambda: empty_model(folder, config.model, device))
    found = together(lambda: base_files.find(Path(folder), model))
    if isinstance(found := _agreed(found), str):
        return found
    together(lambda: base_files.fill(model, found, lambda weight: weight.dim() < 2))
    loss: Any = SupervisedLoss(model)  # torch leaves `_apply` untyped
    loss.files = found
    shard(loss, device, config.cluster.fsdp_replicas, config.cluster.fsdp_offload)
    place = places(loss, device)
    # What is on the meta device becomes memory, shards of weights above all; the rest has its values.
    loss._apply(lambda part: torch.empty_like(part, device=place(part)) if part.is_meta else part.to(place(part)))
    together(lambda: _read_shards(model, found))
    sharded: SupervisedLoss = loss
    return sharded


def _agreed(found: BaseFiles | str) -> BaseFiles | str:
    """The files, if all workers have found that they can be read by rows; else the first reason why not."""
    problems = collectives.gather(found if isinstance(found, str) else None)
    if isinstance(found, BaseFiles) and not any(problems):
        differs = partial(found.differs, collectives.rank(), collectives.world_size())
        problems = collectives.gather(together(differs))
    first = next((problem for problem in problems if problem), None)
    return found if first is None else first


def together(work: Callable[[], Value]) -> Value:
    """What `work` returns; the UserError that one worker meets is raised on all, which would wait for it otherwise."""
    problem: UserError | None = None
    found = []
    try:
        found.append(work())
    except UserError as error:
        problem = error
    collectives.raise_together(problem)
    return found[0]


@torch.no_grad()
def _read_shards(model: nn.Module, files: BaseFiles) -> None:
    """Fill this worker's rows of all other weights."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        assert isinstance(parameter.data, DTensor)
        shard_of: Tensor = parameter.data.to_local()
        first, last = own_rows(parameter.data)
        assert shard_of.shape[0] == last - first
        rows = max(1, AT_ONCE * len(shard_of) // max(shard_of.nbytes, 1))
        count = rows if files.in_parts(name) else max(1, last - first)
        for start in range(first, last, count):
            stop = min(start + count, last)
            shard_of[start - first : stop - first].copy_(files.rows(name, start, stop))
