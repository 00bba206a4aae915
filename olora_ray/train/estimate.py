"""Estimate of a run: targets, coverage, trainable parameters, memory per worker. Needs no weights and no Ray."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from olora_ray.adapter.candidates import HEAD, candidates
from olora_ray.adapter.coverage import Coverage, coverage
from olora_ray.adapter.initialise import check
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS
from olora_ray.adapter.parts import other_parts, part_of
from olora_ray.adapter.targets import Selection, Target, select
from olora_ray.config.schema import Adapter, Config
from olora_ray.model.folder import parameters
from olora_ray.model.load import pick_dtype, skeleton
from olora_ray.model.source import BaseModel
from olora_ray.train.data_driven import refuse
from olora_ray.train.loss import CHUNK_LOGITS

PROCESS_BYTES = 2**30
"""What Python, torch and Ray take for themselves in a worker, or CUDA on its GPU; about."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one worker, by what takes it."""

    targets: dict[str, tuple[int, ...]]
    """Adapted layers with their m x n, stacks of experts with their E x m x n."""
    trainable: int
    """At most, where ranks differ from layer to layer."""
    parameters: int
    base_bytes: int
    adapter_bytes: int
    """Factors, update, gradient, AdamW's two moments and the best update so far, and what a step makes of them."""
    activation_bytes: int
    selection: Selection
    coverage: Coverage

    def total_bytes(self) -> int:
        """All of it but `PROCESS_BYTES`."""
        return self.base_bytes + self.adapter_bytes + self.activation_bytes


def estimate(config: Config, base: BaseModel, gpu: bool | None = None) -> MemoryEstimate:
    """The size of a run; raises UserError for targets or a rank that the model does not have.

    `gpu` says whether the workers have GPUs; None: if this machine has.
    """
    model: Any = skeleton(base, config.model)
    selection = select(model, config.adapter.targets, config.adapter.rank)
    targets = {name: tuple(target.weight().shape) for name, target in selection.targets.items()}
    check(targets, config.adapter.method, config.adapter.rank)
    if config.adapter.method not in FROM_WEIGHTS:
        refuse(selection.targets, config.adapter.method)
    trainable = _trainable(targets.values(), config.adapter)
    width = _dtype(config, torch.cuda.is_available() if gpu is None else gpu).itemsize
    count = parameters(base.folder)
    shards = config.cluster.min_workers() if config.cluster.strategy == "fsdp" else 1
    stored = 2 if METHODS[config.adapter.method].has_b0 else 1
    return MemoryEstimate(
        targets,
        trainable,
        count,
        base_bytes=count * width // shards,
        # Float32. A step joins each layer's factors with its update, and AdamW needs room of its own.
        adapter_bytes=trainable * 4 * (8 + stored),
        activation_bytes=_activations(config, model, selection, width),
        selection=selection,
        coverage=coverage(model, selection),
    )


def _trainable(shapes: Iterable[tuple[int, ...]], adapter: Adapter) -> int:
    """Trainable numbers, at most: where ranks move between layers, the widest get as much as they can."""
    sizes = [(math.prod(experts) * (m + n), min(m, n, adapter.largest_rank())) for *experts, m, n in shapes]
    left, total = adapter.rank * len(sizes), 0
    for size, most in sorted(sizes, reverse=True):
        total += size * min(most, left)
        left -= min(most, left)
    return total


def _dtype(config: Config, gpu: bool) -> torch.dtype:
    """Precision of the base on a worker; GPUs are taken to be fast at bfloat16.

    To ask one of this machine, torch would take memory on it, which is for the workers; and theirs may be elsewhere.
    """
    if gpu and config.model.dtype == "auto":
        return torch.bfloat16
    return pick_dtype(config.model, torch.device("cpu"))


def _activations(config: Config, model: Any, selection: Selection, width: int) -> int:
    """What a backward pass keeps: input, output and hidden of adapted layers, norms and sums of blocks.

    Of other layers of the language model it keeps the output, for what comes after them.
    """
    tokens = config.train.micro_batch * config.data.max_length
    shape, parts, linear = model.config.get_text_config(), other_parts(model), 0
    for name, item in candidates(model).items():
        if item.refused is HEAD or part_of(name, parts):
            continue
        m, n = item.target.shape
        kept = m + n + 2 * config.adapter.largest_rank() if name in selection.targets else m
        linear += kept * (1 if item.target.experts is None else _experts_a_token(shape, item.target))
    blocks = shape.num_hidden_layers * shape.hidden_size * 8
    return int(tokens * (linear + blocks) * width + 3 * 4 * CHUNK_LOGITS)


def _experts_a_token(shape: Any, target: Target) -> int:
    """Experts that see a token: as many as the config says, or all where a module takes no choice."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "num_selects")
    chosen = next((int(value) for name in names if isinstance(value := getattr(shape, name, None), int)), None)
    # Experts outside of transformers' interface may compute every token and leave most of it unused (Llama 4).
    known = chosen is not None and hasattr(target.module, "has_gate")
    assert target.experts is not None
    return min(chosen, target.experts) if known and chosen is not None else target.experts
