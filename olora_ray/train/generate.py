"""Greedy answers to held-out prompts, spread over the workers."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from olora_ray.common import collectives
from olora_ray.common.device import lacks_memory
from olora_ray.common.errors import first_line
from olora_ray.config.schema import Evaluation
from olora_ray.model.packing import positions, takes_padding
from olora_ray.tokens.plan import DOWN, REJECTED
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loop import Trainer
from olora_ray.train.parallel import begin_at_root

AT_ONCE = 20
"""Prompts that are answered together; the groups are the same for any number of workers."""


@dataclass(frozen=True)
class Question:
    """A held-out prompt and the answer in its row (`reference`), as token ids."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    row: int = 0
    """Index of the example in the store."""


def wanted_questions(evaluation: Evaluation, store: TokenStore | None) -> list[Question]:
    """Return the held-out prompts that a run answers: as many as it scores or shows."""
    return questions(store, wanted(evaluation)) if store else []


def wanted(evaluation: Evaluation) -> int:
    return max(evaluation.samples, evaluation.rows) if evaluation.scorer else evaluation.samples


def questions(store: TokenStore, limit: int) -> list[Question]:
    """Return questions from the first `limit` suitable held-out examples.

    The prompt is everything before the last run of supervised tokens. An example whose answer was cut by
    `data.too_long: cut` is left out, because no answer could match an incomplete reference.
    """
    chosen: list[Question] = []
    row = 0
    cuts = store.manifest.inputs.get("too_long") == "cut"
    for index in range(len(store)):
        pack = store[index]
        start = 0
        roles = pack.roles or (0,) * len(pack.segments)
        for size, role in zip(pack.segments, roles, strict=True):
            if len(chosen) >= limit:
                return chosen
            part = slice(start, start + size)
            start += size
            if role == REJECTED:  # an answer to the question before
                continue
            if role == DOWN:  # no reference to compare with
                row += 1
                continue
            cut = cuts and size == store.max_length and bool(pack.supervised[part][-1])
            if not cut:
                ids = pack.input_ids[part].tolist()
                question = _split(row, ids, pack.supervised[part])
                if question:
                    chosen.append(question)
            row += 1
    return chosen


def _split(
    row: int, ids: list[int], supervised: "np.ndarray[Any, np.dtype[np.bool_]]"
) -> Question | None:
    marked = np.flatnonzero(supervised)
    breaks = np.flatnonzero(np.diff(marked) > 1)
    start = int(marked[breaks[-1] + 1] if len(breaks) else marked[0])
    stop = int(marked[-1]) + 1
    # Plain text is supervised from its second token on, so only its first token is left: no prompt to answer.
    if start <= 1:
        return None
    return Question(tuple(ids[:start]), tuple(ids[start:stop]), row)


@torch.no_grad()
def answer(
    trainer: Trainer,
    asked: Sequence[Question],
    max_new_tokens: int,
    eos: Sequence[int],
    worker: int = 0,
    workers: int = 1,
    batch: int = AT_ONCE,
) -> list[list[int]]:
    """Return greedy continuations in the order of `asked`, without prompt and end token; every worker gets all.

    `batch` prompts are answered together. Raises UserError, the same on all workers, if the family's code fails.
    """
    model: Any = trainer.loss.model
    own: list[tuple[int, list[int]]] = []
    problem = None
    sharded = trainer.loss.sharded
    if sharded and not takes_padding(model):
        batch = 1  # otherwise a worker with prompts of several lengths would run the model more often than the others
    # Prompts of similar length are answered together, because they need less padding.
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
    groups = [by_length[first : first + batch] for first in range(0, len(asked), batch)]
    mine = groups[worker::workers]
    # All workers of a sharded base run until the last prompt is done, so the longest prompt sets the limit for all.
    if sharded:
        max_new_tokens = _within(model, [question.prompt for question in asked], max_new_tokens)
    rounds = -(-len(groups) // workers) if sharded else len(mine)
    if sharded:
        begin_at_root(trainer.loss)
    for turn in range(rounds):
        group = mine[turn] if turn < len(mine) else []
        prompts = [asked[i].prompt for i in group or [0]]
        try:
            outputs = greedy(model, prompts, max_new_tokens, eos, trainer.device, together=sharded)
        except Exception as error:
            # With a sharded base the error may be another worker's failure, which a restart may fix.
            if sharded or lacks_memory(error, trainer.device):
                raise
            problem = f"{type(model).__name__} cannot generate ({type(error).__name__}: {first_line(error)})"
            break
        own.extend(zip(group, outputs, strict=False))
    collectives.raise_together(problem)
    pairs = itertools.chain.from_iterable(collectives.gather(own))
    return [output for _, output in sorted(pairs)]


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Switch to an attention that takes masks, which decoding with a cache needs, and drop generation_config.json.

    transformers would complete a call by the settings in that file: beams, penalties, suppressed or forced tokens.
    """
    from transformers import GenerationConfig

    attention = model.config._attn_implementation
    settings = model.generation_config
    model.set_attn_implementation(
        "sdpa" if model._supports_sdpa else "eager"
    )  # Gemma 2 has no sdpa
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        model.set_attn_implementation(attention)


@torch.no_grad()
def greedy(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    eos: Sequence[int],
    device: torch.device,
    together: bool = False,
    streamer: Any = None,
) -> list[list[int]]:
    """Return greedy continuations of token ids, without prompt and end token.

    A `streamer` of transformers gets the tokens of a single prompt one by one.

    Without end tokens (`eos` is empty) each continuation has `max_new_tokens`, or fewer if the model has no positions
    for more. `together`: all workers run until the last of them is done, because each holds a shard of the model. If
    the model would treat padding as text, prompts of different lengths run one length after the other.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1 and not takes_padding(model):
        answers: dict[int, list[int]] = {}
        for length in lengths:
            indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            alike = [prompts[index] for index in indices]
            answers |= zip(
                indices, greedy(model, alike, max_new_tokens, eos, device, together), strict=True
            )
        return [answers[index] for index in range(len(prompts))]
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with decoding(model):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=_within(model, prompts, max_new_tokens),
            do_sample=False,
            num_beams=1,
            eos_token_id=list(eos) or None,
            pad_token_id=eos[0] if eos else 0,
            synced_gpus=together,
            streamer=streamer,
        )
    ends = set(eos)
    results = []
    for row in output[:, longest:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        results.append(row[:stop])
    return results


def _within(model: Any, prompts: Sequence[tuple[int, ...]], wanted: int) -> int:
    """Return the number of new tokens that the model has positions for, at least 1 and at most `wanted`."""
    limit = positions(model)
    longest = max(map(len, prompts), default=0)
    # The last new token needs no position, because it is never an input.
    return wanted if limit is None else max(1, min(wanted, limit + 1 - longest))
