"""A base that no worker ever holds whole: built without weights, sharded, and filled from its files, rows by rows.

Weights of one dimension (norms, biases) are read by every worker: they are small, and some norms are looked at before
the base is sharded (train/fast_norm.py). So is what is in no block (train/parallel.py): of embeddings and head as they
lie in the files a worker without a GPU maps its own, and all workers of a node have the same memory for them.
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
from olora_ray.train.blocks import blocks_to_shard
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import has_own_memory, outside, own_rows, places, shard
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
    whole = outside(model, blocks_to_shard(model))
    wanted = {weight for weight in model.parameters() if weight.dim() < 2 or weight in whole}
    together(lambda: base_files.fill(model, found, wanted.__contains__, partial(_whole, found, device)))
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
        if parameter.dim() < 2 or not isinstance(parameter.data, DTensor):
            continue
        shard_of: Tensor = parameter.data.to_local()
        first, last = own_rows(parameter.data)
        assert shard_of.shape[0] == last - first
        _read_rows(files, name, first, shard_of)


def _whole(files: BaseFiles, device: torch.device, name: str) -> Tensor:
    """All of a weight, a large one on the device: the node's memory never holds more than some rows of it."""
    if len(files.shapes[name]) < 2:
        return files.whole(name)
    if device.type == "cpu" and (mapped := files.mapped(name)) is not None:
        return mapped
    found = torch.empty(files.shapes[name], dtype=files.dtypes[name], device=device)
    _read_rows(files, name, 0, found)
    return found


def _read_rows(files: BaseFiles, name: str, first: int, to: Tensor) -> None:
    """Fill a tensor with as many rows of a weight, from row `first` on."""
    count = max(1, AT_ONCE * len(to) // max(to.nbytes, 1)) if files.in_parts(name) else max(1, len(to))
    for start in range(0, len(to), count):
        stop = min(start + count, len(to))
        to[start:stop].copy_(files.rows(name, first + start, first + stop))
