"""Estimate of a run: targets, trainable parameters, memory per worker, and pace on a CPU.

All but the pace need no weights. Nothing here needs Ray.
"""

import inspect
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olora_ray.adapter.candidates import Target
from olora_ray.adapter.initialise import at_scale, check_rank, initialise, options_of, weight_sizes
from olora_ray.adapter.inject import Selection, find_targets, inject, select
from olora_ray.adapter.layer import AdaptedWeight
from olora_ray.adapter.methods import method_named
from olora_ray.adapter.optimizers.optimizer import optimizer_named
from olora_ray.common.errors import UserError, first_line
from olora_ray.config.decided import DecidedConfig, Expected, Recompute
from olora_ray.config.load import override
from olora_ray.config.schema import Adapter
from olora_ray.model import attention
from olora_ray.model.folder import parameters
from olora_ray.model.load import skeleton
from olora_ray.model.packing import check_lengths, why_scaled
from olora_ray.model.quantised import require
from olora_ray.model.source import BaseModel
from olora_ray.tokens.collate import FLAT_ATTENTION, Batch, collate
from olora_ray.tokens.plan import Pack
from olora_ray.train import parallel, sharded_reader
from olora_ray.train.data_driven import refuse
from olora_ray.train.fake_model import FakeModel, GroupedProducts, LiveBytes, at_blocks
from olora_ray.train.generate import AT_ONCE, decoding, wanted
from olora_ray.train.loop import Trainer, train_mode
from olora_ray.train.loss import SupervisedLoss, chunk_rows
from olora_ray.train.parallel import load_frozen, packed_size
from olora_ray.train.price import Kernels, Work
from olora_ray.train.sharded_reader import blocks_to_shard
from olora_ray.train.tree import most_held

# Memory beside the base and the adapter: measured by running a step, and answers, with fake tensors.


@dataclass(frozen=True)
class MeasuredStep:
    """Peak bytes of a run on fake tensors."""

    step: int
    """Forward and backward pass of a micro-batch, with recomputation if it is on."""
    answers: int
    problem: str | None = None
    """The part that is not counted, and the reason: the model's code does not run on fake tensors."""
    work: Work = field(default_factory=dict)
    """The kernels of the micro-batch's passes; empty if they are not counted."""


def measure(
    model: Any, targets: Mapping[str, Target], config: DecidedConfig, expected: Expected
) -> MeasuredStep:
    """Run a step and answers on fake tensors; the model must be on the meta device, and is unusable afterwards."""
    config, times = _small_enough(config)
    gpu = expected.gpu
    dtype = getattr(torch, expected.dtype)
    problem = "activations (no attention can be tried)"
    with attention.on_fake_tensors(gpu):
        fake = FakeModel(model, targets, config.adapter, dtype)
        rows = chunk_rows(
            int(model.config.get_text_config().vocab_size), torch.device("cuda" if gpu else "cpu")
        )
        # Fake tensors claim to be on a CPU, where the head's chunks are smaller than on a GPU.
        fake.loss.__dict__["chunk"] = lambda _: rows
        for layer in fake.adapted.values():
            if gpu and config.adapter.dropout:
                layer.__dict__["dropped_out"] = partial(_dropped_out, layer)
        for name in _implementations(model, config, expected):
            try:
                model.set_attn_implementation(name)
                step, once = _step(fake, config, name)
            except Exception as error:  # the family's code may raise anything on fake tensors
                problem = f"activations ({type(error).__name__}: {first_line(error)})"
                continue
            work = {kernel: times * count for kernel, count in once.items()}
            try:
                answers = _answer_bytes(fake, config)
                return MeasuredStep(int(times * step), int(times * answers), work=work)
            except Exception as error:
                why = f"answers to held-out prompts ({type(error).__name__}: {first_line(error)})"
                return MeasuredStep(int(times * step), 0, why, work)
    return MeasuredStep(0, 0, problem)


def _dropped_out(layer: AdaptedWeight, x: Tensor) -> Tensor:
    # On a GPU the mask that is kept has a byte per number, on a CPU it has the input's precision.
    return torch.native_dropout(x, layer.dropout, True)[0] if layer.training else x


def _small_enough(config: DecidedConfig) -> tuple[DecidedConfig, float]:
    """Return the config with a micro-batch that is small enough to try, and the factor to the tokens of the real one.

    Token ids and segment borders are not fake: they take memory and time.
    """
    length = config.data.max_length
    most = 2**16
    tokens = config.train.micro_batch * length
    if tokens <= most:
        return config, 1.0
    small = override(
        config, {"train.micro_batch": max(1, most // length), "data.max_length": min(length, most)}
    )
    return small, tokens / (small.train.micro_batch * small.data.max_length)


def _implementations(model: Any, config: DecidedConfig, expected: Expected) -> tuple[str, ...]:
    dtype = getattr(torch, expected.dtype)
    flat = not why_scaled(model, config.train.micro_batch * config.data.max_length)
    if not expected.gpu:
        try:
            names = attention.candidates(model, config.model, dtype, torch.device("cpu"))
        except UserError:  # raised again when the workers load the model
            names = ()
        return tuple(name for name in names if flat or name not in FLAT_ATTENTION) or (
            attention.own(model),
        )
    return (attention.stand_in(expected.attention, dtype, flat), attention.own(model))


def widest(config: DecidedConfig, name: str) -> Batch:
    """Return a micro-batch of full length for the attention `name`, with a loss at each token."""
    length = config.data.max_length
    # Short segments need the most memory, because their attention is computed by products (model/attention.py).
    size = min(length, attention.SHORT)
    segments = (*[size] * (length // size), *([rest] if (rest := length % size) else []))
    supervised = np.ones(length, dtype=bool)
    supervised[np.cumsum((0, *segments[:-1]))] = False
    pack = Pack(np.zeros(length, dtype=np.int32), supervised, segments)
    return collate([pack] * config.train.micro_batch, name)


def _step(fake: FakeModel, config: DecidedConfig, name: str) -> tuple[int, Work]:
    """Return the peak bytes and the kernels of a micro-batch's passes with the attention `name`."""
    batch = widest(config, name)
    length = config.data.max_length
    fake.run_again(config.train.activation_checkpointing)
    # Only two chunks of the head are run, because the peak is in the second, while the results of the first are alive.
    # The other chunks are counted by hand: each has the hidden states of its positions, and their gradients.
    model: Any = fake.loss.model
    rows = 2 * fake.loss.chunk(batch.labels.device)
    numbers = 2 * max(0, len(batch.labels) - rows) * int(model.config.get_text_config().hidden_size)
    few = replace(batch, predicts=batch.predicts[:rows], labels=batch.labels[:rows])
    live = LiveBytes(fake.tensors())
    kernels = Kernels(attended=(min(length, attention.SHORT) + 1) / 2)
    with (
        at_blocks(fake.blocks, live) as before,
        fake.counting(kernels, head=len(batch.labels) / max(1, len(few.labels))),
        fake.mode,
    ):
        few = fake.without_numbers(few)
        with live, GroupedProducts(), kernels:
            fake.loss(few).backward()
    # The peak is when all blocks have kept their activations: at the head, or in the backward pass of the last block.
    size: int = live.most + _of_skipped(fake, before) + numbers * model.dtype.itemsize
    return size, kernels.work


def _of_skipped(fake: FakeModel, before: Sequence[int]) -> int:
    """Return the bytes that the skipped blocks would keep; `before` has the bytes alive before each block."""
    kept = [stop - start for start, stop in pairwise(before[: len(fake.blocks) + 1])]
    return sum(more * kept[position] for position, more in fake.more.items())


def answers_at_once(config: DecidedConfig) -> int:
    """Return the largest number of held-out prompts that a worker answers together."""
    return min(AT_ONCE, wanted(config.evaluation)) if config.data.holds_out() else 0


def _answer_bytes(fake: FakeModel, config: DecidedConfig) -> int:
    rows = answers_at_once(config)
    prompt = config.data.max_length
    if not rows:
        return 0
    train_mode(fake.adapted, False)
    whole = prompt + config.evaluation.max_new_tokens
    with decoding(fake.loss.model), fake.mode, torch.no_grad():
        return max(
            _most(fake, rows, prompt, decode=False), _most(fake, rows, whole - 1, decode=True)
        )


def _most(fake: FakeModel, rows: int, tokens: int, *, decode: bool) -> int:
    """Return the peak bytes while `tokens` tokens are read, or with `decode` while one more token follows them."""
    model: Any = fake.loss.model
    live = LiveBytes(fake.tensors())
    takes = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    name = (
        "cache" if "cache" in takes else "past_key_values"
    )  # families name this argument differently
    with at_blocks(fake.blocks, live) as before, live, GroupedProducts():
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        cache = model(
            ids, attention_mask=torch.ones_like(ids), use_cache=True, **last
        ).past_key_values
        if decode:
            live.most = live.now
            mask = torch.ones(rows, tokens + 1, dtype=torch.int64)
            model(ids[:, :1], attention_mask=mask, use_cache=True, **{name: cache})
    return live.most + _of_skipped(fake, before)


COPIES = 8
"""Float32 copies of the trainable numbers beside the factors: update, gradient, AdamW's two moments and the best update
so far. Three more exist while AdamW computes, or while a checkpoint is written on a CPU."""


@dataclass(frozen=True)
class MemoryEstimate:
    targets: dict[str, tuple[int, ...]]
    """Adapted layer -> (m, n); stack of experts -> (E, m, n)."""
    trainable: int
    """Trainable numbers; an upper bound if ranks differ between layers."""
    parameters: int
    base_bytes: int
    adapter_bytes: int
    """Bytes of the factors, `COPIES` of the trainable numbers, and the partial sums of a step's gradients."""
    activation_bytes: int
    """Peak bytes of a forward and backward pass."""
    selection: Selection
    answer_bytes: int = 0
    """Peak bytes of answers to held-out prompts, between steps."""
    recompute: Recompute = False
    gathered_bytes: int = 0
    """Bytes of gathered blocks of a sharded base; for a packed base, bytes of its largest unpacked layer."""
    problem: str | None = None
    """The part that is not counted, and the reason (`Measured.problem`)."""
    work: Work = field(default_factory=dict)
    """The kernels of a micro-batch's passes (train/price.py); empty if they are not counted."""
    by_rows: bool = False
    """True if no worker ever holds the whole base: each reads only its shard, or packs layer by layer."""

    def total_bytes(self) -> int:
        """Return the bytes on the device of the model, without those of the process (cluster/preflight.py)."""
        return (
            self.base_bytes
            + self.gathered_bytes
            + self.adapter_bytes
            + max(self.activation_bytes, self.answer_bytes)
        )


def estimate(config: DecidedConfig, base: BaseModel, expected: Expected) -> MemoryEstimate:
    """Estimate a run; raises UserError if targets, rank or sequence length do not fit the model."""
    asked = (
        config.model,
        config.adapter,
        config.data.max_length,
        config.data.packing,
        config.train.micro_batch,
    )
    answers = (answers_at_once(config), config.evaluation.max_new_tokens)
    again = config.train.activation_checkpointing
    key = f"{base} {expected} {asked!r} {answers} {again} {_shards(config)} {_set_aside(config)}"
    question = _Question(key, config, base, expected)
    return _estimate(question) if base.digest else _estimate.__wrapped__(question)


# The key of the cache: two questions are equal if their estimates are.
@dataclass(frozen=True)
class _Question:
    key: str
    config: DecidedConfig = field(compare=False)
    base: BaseModel = field(compare=False)
    expected: Expected = field(compare=False)


@lru_cache(
    maxsize=16
)  # a run estimates itself several times: for the report, the preflight and the workers
def _estimate(question: _Question) -> MemoryEstimate:
    config = question.config
    base = question.base
    expected = question.expected
    model: Any = skeleton(base, config.model)
    check_lengths(model, config)
    selection = select(model, config.adapter.targets, config.adapter.rank)
    targets = {name: target.whole_shape for name, target in selection.targets.items()}
    check_rank(targets, config.adapter.method, config.adapter.rank)
    if method_named(config.adapter.method).needs != "weight":
        refuse(selection.targets, config.adapter.method)
    trainable = _trainable(targets.values(), config.adapter)
    # The workers' GPUs are not asked. Asking a GPU of this machine would make torch take memory on it that the workers
    # need, and the workers' GPUs may be on other machines.
    dtype = getattr(torch, expected.dtype)
    count = parameters(base.folder)
    stored = 2 if method_named(config.adapter.method).has_b0 else 1
    in_parts = _shards(config) > 1 or config.model.quantization != "none"
    by_rows = in_parts and not isinstance(sharded_reader.find(Path(base.folder), model), str)
    base_bytes, gathered = _base_bytes(config, model, count, dtype)
    taken = measure(model, selection.targets, config, expected)
    return MemoryEstimate(
        targets,
        trainable,
        count,
        base_bytes=base_bytes,
        adapter_bytes=trainable * 4 * (COPIES + _set_aside(config) + stored),
        activation_bytes=taken.step,
        answer_bytes=taken.answers,
        selection=selection,
        recompute=config.train.activation_checkpointing,
        gathered_bytes=gathered,
        problem=taken.problem,
        work=taken.work,
        by_rows=by_rows,
    )


def _base_bytes(
    config: DecidedConfig, model: Any, count: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return MemoryEstimate's (base_bytes, gathered_bytes); `count` is the numbers in the files."""
    quantization = config.model.quantization
    width = dtype.itemsize
    shards = _shards(config)
    if quantization != "none":
        require(quantization)
        numbers, size, unpacked = packed_size(model, quantization, dtype)
        return (count - numbers) * width + size, unpacked
    if shards == 1:
        return count * width, 0
    sizes = [
        sum(weight.numel() for weight in block.parameters()) * width
        for block in blocks_to_shard(model)
    ]
    root = sum(weight.numel() for weight in model.parameters()) * width - sum(sizes)
    # A gathered block exists twice for a moment: as received, and copied into its weights. The third copy is the next
    # block, which FSDP gathers while this one is used.
    return root + (count * width - root) // shards, 3 * max(sizes, default=0)


def _set_aside(config: DecidedConfig) -> int:
    return most_held(config.train.micro_batches(), config.cluster.fewest)


def _shards(config: DecidedConfig) -> int:
    cluster = config.cluster
    return max(1, cluster.fewest // cluster.fsdp_replicas) if cluster.strategy == "fsdp" else 1


def _trainable(shapes: Iterable[tuple[int, ...]], adapter: Adapter) -> int:
    # An upper bound: if the method moves ranks between layers, the widest layers get the largest ranks.
    sizes = [
        (math.prod(experts) * (m + n), min(m, n, adapter.largest_rank()))
        for *experts, m, n in shapes
    ]
    left = adapter.rank * len(sizes)
    total = 0
    for size, most in sorted(sizes, reverse=True):
        total += size * min(most, left)
        left -= min(most, left)
    return total


# Pace of a training: one micro-batch forward and backward, measured with the real model on this machine's CPU.


MOST_WORK = 5e11
"""Largest weights x tokens of a micro-batch that is measured: half a minute on a slow core, and it runs twice."""


def not_measured(config: DecidedConfig, size: MemoryEstimate, elsewhere: bool) -> str | None:
    """Return the reason why the pace is not measured here, or None. `elsewhere`: the run is on other machines."""
    if elsewhere:
        return "the workers run on another machine"
    if torch.cuda.is_available():
        return "only CPUs are measured"
    if size.parameters * config.train.micro_batch * config.data.max_length > MOST_WORK:
        return "one micro-batch of this model and length would take a minute or more"
    return None


def micro_batch(
    config: DecidedConfig, base: BaseModel, packs: Sequence[Pack], steps: int
) -> tuple[float, float | None]:
    """Train on these sequences, forward and backward, in one process with a worker's threads.

    Return the seconds that takes, and the automatic learning rate of `steps` steps; None for a data-driven method.
    """
    device = torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    try:
        model: Any = load_frozen(base.folder, config.model, device)
        targets = find_targets(model, config.adapter.targets, config.adapter.rank)
        adapter = config.adapter
        # Steps take the same time with any method, and a data-driven one would need training data for its factors.
        method = adapter.method if method_named(adapter.method).needs == "weight" else "lora"
        factors, _ = initialise(
            targets, method, adapter.rank, config.run.seed, device, options_of(adapter)
        )
        sizes = {}
        if optimizer_named(config.train.optimizer).sizes:
            sizes = weight_sizes(targets, device)
        adapted = inject(model, at_scale(factors, adapter), adapter.scale())
        loss = SupervisedLoss(model)
        layout = model.config._attn_implementation
        batch = collate(packs, layout)
        loss.recompute = config.train.activation_checkpointing
        parallel.install(loss)
        rate = None
        if method == adapter.method:
            trainer = Trainer(loss, adapted, config, device, sizes=sizes)
            rate = trainer.automatic_rate(packs, steps, layout)
        times = []
        for _ in range(2):  # the first pass is slower, because it allocates its memory
            began = time.perf_counter()
            loss(batch).backward()
            times.append(time.perf_counter() - began)
        return min(times), rate
    finally:
        torch.set_num_threads(threads)
