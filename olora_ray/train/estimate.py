"""Estimate of a run: targets, coverage, trainable parameters, memory per worker. Needs no weights and no Ray."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from olora_ray.adapter.candidates import candidates
from olora_ray.adapter.coverage import Coverage, coverage
from olora_ray.adapter.initialise import check
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS
from olora_ray.adapter.targets import Selection, select
from olora_ray.common import kept
from olora_ray.common.errors import first_line
from olora_ray.config.schema import Adapter, Config
from olora_ray.model.folder import parameters
from olora_ray.model.load import pick_dtype, skeleton
from olora_ray.model.packing import check_lengths
from olora_ray.model.quantised import require
from olora_ray.model.source import BaseModel
from olora_ray.train import base_files
from olora_ray.train.activation_formula import by_formula, held_by_experts
from olora_ray.train.answer_memory import answers_at_once, cache_bytes
from olora_ray.train.blocks import blocks_to_shard
from olora_ray.train.data_driven import refuse
from olora_ray.train.quantised_base import packed_size
from olora_ray.train.step_memory import Taken, measure
from olora_ray.train.tree import most_held

COPIES = 8
"""Float32 copies of the trainable numbers beside the factors: update, gradient, AdamW's two moments and the best update
so far; and three more while AdamW computes, or while a checkpoint is written on a CPU."""
MOST_TOKENS = 2**18
"""Of a micro-batch that is tried without memory: its tokens and borders have memory and take time, few fit more."""
PROCESS_BYTES = 2**30
"""What Python, torch and Ray take for themselves in a worker, or CUDA on its GPU; about."""
_TAKEN = TypeAdapter(tuple[int, int, str | None])


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
    """Factors, `COPIES` of what is trained, and what the sum of a step's gradients sets aside."""
    activation_bytes: int
    """Of a forward and backward pass."""
    selection: Selection
    coverage: Coverage
    answer_bytes: int = 0
    """Of answers to held-out prompts, between steps."""
    recompute: bool = False
    """Whether blocks are run again in it."""
    gathered_bytes: int = 0
    """Of a sharded base, what is whole on each worker at once; of a packed one, its largest layer while unpacked."""
    problem: str | None = None
    """Why activations are by a formula; None: the model's code has told."""
    offloaded_bytes: int = 0
    """Of a sharded base, what lies in the memory of the node instead of the GPU's; not in `base_bytes`."""
    by_rows: bool = False
    """Whether each worker reads its part of a sharded base alone, or packs layer by layer: none ever has the whole."""

    def total_bytes(self) -> int:
        """All of it where the model is, but `PROCESS_BYTES`."""
        return (
            self.base_bytes + self.gathered_bytes + self.adapter_bytes + max(self.activation_bytes, self.answer_bytes)
        )


def estimate(config: Config, base: BaseModel, gpu: bool | None = None) -> MemoryEstimate:
    """The size of a run; raises UserError for targets, a rank or a length of sequences that are not for the model.

    `gpu` says whether the workers have GPUs; None: if this machine has.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    asked = (config.model, config.adapter, config.data.max_length, config.data.packing, config.train.micro_batch)
    answers = (answers_at_once(config), config.evaluation.max_new_tokens)
    again = config.train.activation_checkpointing is True
    key = (
        f"{base} {gpu} {asked!r} {answers} {again} {_shards(config)} {_set_aside(config)} {config.cluster.fsdp_offload}"
    )
    question = _Question(key, config, base, gpu)
    return _estimate(question) if base.digest else _estimate.__wrapped__(question)


@dataclass(frozen=True)
class _Question:
    """Equal to another if the answer is the same."""

    key: str
    config: Config = field(compare=False)
    base: BaseModel = field(compare=False)
    gpu: bool = field(compare=False)


@lru_cache(maxsize=16)  # it is asked for people, for the cluster, and for the workers
def _estimate(question: _Question) -> MemoryEstimate:
    config, base = question.config, question.base
    model: Any = skeleton(base, config.model)
    check_lengths(model, config)
    selection = select(model, config.adapter.targets, config.adapter.rank)
    targets = {name: target.whole_shape for name, target in selection.targets.items()}
    check(targets, config.adapter.method, config.adapter.rank)
    if config.adapter.method not in FROM_WEIGHTS:
        refuse(selection.targets, config.adapter.method)
    trainable = _trainable(targets.values(), config.adapter)
    dtype = _dtype(config, question.gpu)
    count = parameters(base.folder)
    stored = 2 if METHODS[config.adapter.method].has_b0 else 1
    covered = coverage(model, selection)
    in_parts = _shards(config) > 1 or config.model.quantization != "none"
    by_rows = in_parts and not isinstance(base_files.find(Path(base.folder), model), str)
    base_bytes, gathered, offloaded = _base_bytes(config, model, count, dtype, question.gpu)
    taken, problem = _kept(question, model, selection, dtype)
    return MemoryEstimate(
        targets,
        trainable,
        count,
        base_bytes=base_bytes,
        adapter_bytes=trainable * 4 * (COPIES + _set_aside(config) + stored),
        activation_bytes=taken.step,
        answer_bytes=taken.answers,
        selection=selection,
        coverage=covered,
        recompute=config.train.activation_checkpointing is True,
        gathered_bytes=gathered,
        problem=problem,
        offloaded_bytes=offloaded,
        by_rows=by_rows,
    )


def _base_bytes(config: Config, model: Any, count: int, dtype: torch.dtype, gpu: bool) -> tuple[int, int, int]:
    """(bytes of a worker's part of the base, of what of it is whole beside that, of what lies in the node's memory).

    `count` are the numbers in the files.
    """
    kind, width, shards = config.model.quantization, dtype.itemsize, _shards(config)
    if kind != "none":
        require(kind)
        numbers, size, unpacked = packed_size(model, kind, dtype)
        return (count - numbers) * width + size, unpacked, 0
    if shards == 1:
        return count * width, 0, 0
    root, block = (numbers * width for numbers in _sizes(model))
    # What is gathered is there twice for a moment, as it came and in the weights' own places; the next block is
    # gathered while one is used.
    part = (count * width - root) // shards
    if not (config.cluster.fsdp_offload and gpu):
        return root + part, 3 * block, 0
    return root, 3 * block + 2 * block // shards, part


def _set_aside(config: Config) -> int:
    """Gradients of parts of a step that a worker holds beside their sum (train/tree.py)."""
    return most_held(config.train.micro_batches(), config.cluster.min_workers())


def _shards(config: Config) -> int:
    """Parts of the base, of which each worker holds one."""
    cluster = config.cluster
    return max(1, cluster.min_workers() // cluster.fsdp_replicas) if cluster.strategy == "fsdp" else 1


def _trainable(shapes: Iterable[tuple[int, ...]], adapter: Adapter) -> int:
    """Trainable numbers, at most: where ranks move between layers, the widest get as much as they can."""
    sizes = [(math.prod(experts) * (m + n), min(m, n, adapter.largest_rank())) for *experts, m, n in shapes]
    left, total = adapter.rank * len(sizes), 0
    for size, most in sorted(sizes, reverse=True):
        total += size * min(most, left)
        left -= min(most, left)
    return total


def _dtype(config: Config, gpu: bool) -> torch.dtype:
    """Precision of the base on a worker; GPUs are taken to be fast at bfloat16 (cluster/memory_room.py: as_loaded).

    To ask one of this machine, torch would take memory on it, which is for the workers; and theirs may be elsewhere.
    """
    if gpu and config.model.dtype == "auto":
        return torch.bfloat16
    return pick_dtype(config.model, torch.device("cpu"))


def _kept(question: _Question, model: Any, selection: Selection, dtype: torch.dtype) -> tuple[Taken, str | None]:
    """As `_taken`; what it finds of a model is kept on this node."""
    place = kept.place("memory-plans", question.key, dtype, *selection.targets)
    if question.base.digest and (text := kept.read(place)):
        try:
            step, answers, problem = _TAKEN.validate_json(text)
            return Taken(step, answers), problem
        except ValueError:
            pass  # damaged
    found, problem = _taken(question.config, model, selection, dtype, question.gpu)
    if question.base.digest:
        kept.keep(place, json.dumps([found.step, found.answers, problem]))
    return found, problem


def _taken(config: Config, model: Any, selection: Selection, dtype: torch.dtype, gpu: bool) -> tuple[Taken, str | None]:
    """Bytes of a step and of answers, and why they are by a formula if they are; uses the model up."""
    found, width = candidates(model), dtype.itemsize
    formula = Taken(by_formula(config, model, found, selection, width), cache_bytes(config, model, width))
    held = held_by_experts(config, model, found, selection)
    if (tokens := config.train.micro_batch * config.data.max_length) > MOST_TOKENS:
        return formula, f"a micro-batch of {tokens:,} tokens is not tried"
    try:
        return measure(model, selection.targets, held, config, dtype, gpu), None
    except RuntimeError as error:
        return formula, first_line(error)


def _sizes(model: Any) -> tuple[int, int]:
    """Numbers of the base that are in no block, and of its largest block."""
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in blocks_to_shard(model)]
    return sum(weight.numel() for weight in model.parameters()) - sum(sizes), max(sizes, default=0)
