"""What a training takes beside the base and the adapter: found by running a step, and answers, with fake tensors.

The model's own code runs forward and backward on tensors that have shapes and no memory, with the adapters in place and
a micro-batch of the largest sequences; the memory that its tensors would take is counted as they come and go. So
whatever a family keeps for its backward pass counts, with masks, and logits as far as they are there at once. Blocks
that are the same are run once and counted as often as there are.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from olora_ray.adapter.targets import Target
from olora_ray.common.errors import UserError, first_line
from olora_ray.config.schema import Config
from olora_ray.model import attention, segment_attention, varlen_attention
from olora_ray.model.packing import why_scaled
from olora_ray.tokens.collate import FLAT_ATTENTION, Batch, collate
from olora_ray.tokens.store import Pack
from olora_ray.train.answer_memory import answer_bytes, cache_bytes
from olora_ray.train.fake_model import FakeModel, GroupedProducts, Held
from olora_ray.train.live_bytes import LiveBytes, at_blocks
from olora_ray.train.loss import chunk_rows

CHUNKS = 2
"""Chunks of the head that are run: the second comes while what the first has made is there."""


@dataclass(frozen=True)
class Taken:
    """Bytes at their most."""

    step: int
    """Of a forward and backward pass of a micro-batch; blocks are run again if that is on."""
    answers: int
    """Of answers to held-out prompts."""


def measure(
    model: Any, targets: Mapping[str, Target], held: Mapping[str, Held], config: Config, dtype: torch.dtype, gpu: bool
) -> Taken:
    """What a training takes, by running it without memory.

    The model is on the meta device, and used up by this; `held` is what its experts take if they cannot be run. Raises
    RuntimeError if the model's code does not run without numbers.
    """
    segment_attention.register()
    names = _implementations(model, config, dtype, gpu)
    problem = "there is no attention to try it with"
    try:
        fake = FakeModel(model, targets, config.adapter, dtype)
        rows = chunk_rows(int(model.config.get_text_config().vocab_size), torch.device("cuda" if gpu else "cpu"))
        fake.loss.__dict__["chunk"] = lambda _: rows  # fake tensors say that they are on a CPU
        for place, name in enumerate((*names, *(names if held else ()))):
            if place == len(names):
                fake.hold(held)
            try:
                model.set_attn_implementation(name)
                with segment_attention.as_on_gpu() if gpu else nullcontext():
                    step = _bytes(
                        fake,
                        _batch(config, name),
                        recompute=config.train.activation_checkpointing is True,
                        apart=config.data.packing is False,
                    )
                return Taken(step, _of_answers(fake, config, dtype))
            except Exception as error:  # the family's code may do anything
                problem = f"{type(error).__name__}: {first_line(error)}"
    finally:
        segment_attention.forget()  # what it has kept of fake tensors
    raise RuntimeError(problem)


def _of_answers(fake: FakeModel, config: Config, dtype: torch.dtype) -> int:
    try:
        return answer_bytes(fake, config)
    except Exception:  # the family's code may do anything
        return cache_bytes(config, fake.loss.model, dtype.itemsize)


def _implementations(model: Any, config: Config, dtype: torch.dtype, gpu: bool) -> tuple[str, ...]:
    """Attentions that may be used, the likeliest first; nobody asks a GPU, which may be on another machine."""
    wanted: str = config.model.attention
    apart = why_scaled(model, config.train.micro_batch * config.data.max_length)
    if not gpu:
        try:
            found = attention.candidates(model, config.model, dtype, torch.device("cpu"))
        except UserError:  # said when it is loaded
            found = ()
        return tuple(name for name in found if not apart or name not in FLAT_ATTENTION) or (attention.own(model),)
    if wanted == "auto":
        there = importlib.util.find_spec("flash_attn") or varlen_attention.kernel()
        flat = there and not apart and dtype in (torch.bfloat16, torch.float16)
        wanted = attention.FLASH if flat else "sdpa"
    # Flash attention, and torch's for variable lengths, keep what torch's fused kernel keeps, of the same layout.
    first = "segments" if wanted in (attention.FLASH, attention.VARLEN) else wanted
    return (first, attention.own(model))


def _batch(config: Config, name: str) -> Batch:
    """A micro-batch of sequences that are full; every token but the first of an example is supervised."""
    length = config.data.max_length
    # Short segments take most, where their attention is by products (model/segment_attention.py).
    size = min(length, segment_attention.SHORT)
    segments = (*[size] * (length // size), *([rest] if (rest := length % size) else []))
    supervised = np.ones(length, dtype=bool)
    supervised[np.cumsum((0, *segments[:-1]))] = False
    pack = Pack(np.zeros(length, dtype=np.int32), supervised, segments)
    return collate([pack] * config.train.micro_batch, name)


def _bytes(fake: FakeModel, batch: Batch, recompute: bool, apart: bool = False) -> int:
    """The most that is alive, were all blocks run; `apart`: a sequence is one example, which needs no mask."""
    fake.run_again(recompute)
    few, left_out = _few_labels(fake, batch)
    live = LiveBytes(fake.tensors())
    with at_blocks(fake.blocks, live) as before, fake.mode:
        few = fake.without_numbers(few)
        with live, GroupedProducts(), _positions_unseen() if apart else nullcontext():
            fake.loss(few).backward()
    kept = [stop - start for start, stop in pairwise(before)]
    # The most comes when all blocks have kept theirs: at the head, or in the last block's backward pass.
    return live.most + sum(more * kept[place] for place, more in fake.more.items()) + left_out


@contextmanager
def _positions_unseen() -> Iterator[None]:
    """transformers makes a mask of positions where it may not look whether they tell of several examples."""
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _few_labels(fake: FakeModel, batch: Batch) -> tuple[Batch, int]:
    """The batch with labels for a few chunks of the head, all of which are alike; and the bytes of all others.

    These are hidden states that are to be predicted from, and their gradients.
    """
    model: Any = fake.loss.model
    rows = CHUNKS * fake.loss.chunk(batch.labels.device)
    others = max(0, len(batch.labels) - rows)
    numbers = 2 * others * int(model.config.get_text_config().hidden_size)
    return replace(batch, predicts=batch.predicts[:rows], labels=batch.labels[:rows]), numbers * model.dtype.itemsize
