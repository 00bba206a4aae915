"""Pace of a training, measured: one micro-batch forward and backward through the real model on this machine's CPU.

What it leaves out: other workers on the same cores, the exchange of gradients, and machines that are not this one.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch

from olora_ray.adapter.initialise import at_scale, initialise, options_of
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.methods import FROM_WEIGHTS
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import Pack
from olora_ray.train import recompute
from olora_ray.train.estimate import MemoryEstimate
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.quantised_base import load_frozen

MOST_WORK = 5e11
"""Weights times tokens of a micro-batch, up to which it is measured: half a minute on a slow core, and that twice."""


def not_measured(config: Config, size: MemoryEstimate, elsewhere: bool) -> str | None:
    """Why a training of this size is not measured here; None if it is. `elsewhere`: it runs on other machines."""
    if elsewhere:
        return "the workers run on another machine"
    if torch.cuda.is_available():
        return "it is measured on CPUs only"
    if size.parameters * config.train.micro_batch * config.data.max_length > MOST_WORK:
        return "one micro-batch of this model and length would take a minute or more"
    return None


def seconds_per_micro_batch(config: Config, base: BaseModel, packs: Sequence[Pack]) -> float:
    """Seconds for these sequences, forward and backward, in one process with a worker's number of threads."""
    device = torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    try:
        model: Any = load_frozen(base.folder, config.model, device)
        targets = find_targets(model, config.adapter.targets, config.adapter.rank)
        adapter = config.adapter
        method = adapter.method if adapter.method in FROM_WEIGHTS else "lora"  # as fast, and needs no data
        factors, _ = initialise(targets, method, adapter.rank, config.run.seed, device, options_of(adapter))
        inject(model, at_scale(factors, adapter), adapter.scale())
        loss, batch = SupervisedLoss(model), collate(packs, model.config._attn_implementation)
        loss.recompute = config.train.activation_checkpointing is True
        recompute.install(loss)
        times = []
        for _ in range(2):  # the first has to get its memory
            began = time.perf_counter()
            loss(batch).backward()
            times.append(time.perf_counter() - began)
        return min(times)
    finally:
        torch.set_num_threads(threads)
