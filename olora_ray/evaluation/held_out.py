"""Held-out loss and answers of one model, row by row, spread over the cluster."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from olora_ray.adapter.peft_folder import CONFIG as ADAPTER_CONFIG
from olora_ray.adapter.peft_folder import WEIGHTS as ADAPTER_WEIGHTS
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common import node_cache
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.schema import AnyConfig, Model
from olora_ray.evaluation.groups import origins
from olora_ray.evaluation.rows import RowResults
from olora_ray.model.load import load_model, pick_dtype
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.pipeline.answers import as_text, check
from olora_ray.pipeline.base import Base
from olora_ray.tokens.collate import collate
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import scoring
from olora_ray.train.generate import Question, decoding, greedy, questions
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import choose_attention

logger = logging.getLogger(__name__)

# Pieces of work spread over the cluster, done by actors that load a model once. Not by Ray Data: it gives its actors
# arguments in Ray's store, and Ray's C++ log warns of each such actor.


Work = TypeVar("Work")
Result = TypeVar("Result")


def map_over_actors(
    make: Callable[[], Callable[[Work], Result]], works: Sequence[Work], config: AnyConfig
) -> list[Result]:
    """The results of all `works`, in their order; each actor calls `make` once, and what it returns once per work.

    At most cluster.workers actors, each with cluster.cpus_per_worker CPUs (its number of threads) and
    cluster.gpus_per_worker GPUs; fewer if the cluster has no room for more. `make` pickles; what it makes
    must give the same result on any actor; says so where they cannot, since `auto` means several precisions. Needs
    ray.init; raises the UserError of a work.
    """
    if not works:
        return []
    import ray

    wanted, found, precisions = worker_resources(config), dict[int, Result](), set()
    threads = max(1, math.floor(config.cluster.cpus_per_worker))
    # What is made comes with each work, not with the start: an actor that is started again may find it lost by then.
    kind: Any = ray.remote(max_restarts=-1, max_task_retries=-1)(_Actor)
    kind = kind.options(num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0))
    actors = [kind.remote() for _ in range(min(len(works), config.cluster.max_workers()))]
    made_of, numbers = ray.put((make, threads, config.model)), iter(range(len(works)))
    # Those for which there is no room never answer, and get no work.
    waiting: dict[Any, tuple[Any, int | None]] = {actor.ready.remote(): (actor, None) for actor in actors}
    try:
        while len(found) < len(works):
            [answer], _ = ray.wait(list(waiting))
            actor, number = waiting.pop(answer)
            if number is not None:
                result, precision = ray.get(answer)
                if isinstance(result, UserError):
                    # Ray would say that it repeats what is cut off here.
                    if busy := [each for each, (_, number) in waiting.items() if number is not None]:
                        ray.wait(busy, num_returns=len(busy))
                    raise result
                before, found[number] = 10 * len(found) // len(works), result
                precisions.add(precision)
                if len(works) >= 10 and 10 * len(found) // len(works) > before:
                    logger.info(f"evaluation: {len(found) / len(works):.0%} done")
            if (number := next(numbers, None)) is not None:
                waiting[actor.run.remote(made_of, works[number])] = actor, number
            else:
                ray.kill(actor)  # makes room for one that is started again
    finally:
        for actor in actors:
            ray.kill(actor)
    if len(precisions) > 1:
        logger.warning(
            f"model.dtype: auto: measured in {' and '.join(sorted(precisions))}, each row in that of the node which"
            " measured it; use nodes of one kind, or set it"
        )
    return [found[number] for number in range(len(works))]


class _Actor:
    """Runs one work after the other; a UserError is a result, so that Ray does not wrap it."""

    made: Callable[[Any], Any] | None = None
    precision = ""

    def ready(self) -> None:
        """Answer, once there is room for this actor."""

    def run(self, made_of: tuple[Callable[[], Callable[[Any], Any]], int, Model], work: Any) -> tuple[Any, str]:
        """The result of a work, and the precision in which it was made."""
        make, threads, model = made_of
        try:
            if self.made is None:
                torch.set_num_threads(threads)
                quiet_transformers()
                self.made = make()
                self.precision = str(pick_dtype(model, assigned_device())).removeprefix("torch.")
            return self.made(work), self.precision
        except UserError as error:
            return error, self.precision


ANSWERS_AT_ONCE = 20


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a held-out prompt."""

    row: int
    """Number of the example in the store."""
    origin: str
    """FILE:LINE of the row."""
    text: str
    reference: str
    scores: Mapping[str, float]


def measure(base: Base, adapter: str | None, store: TokenStore, config: AnyConfig) -> RowResults:
    """The numbers of `measure_and_answer` alone."""
    return measure_and_answer(base, adapter, store, config)[0]


def measure_and_answer(
    base: Base, adapter: str | None, store: TokenStore, config: AnyConfig
) -> tuple[RowResults, tuple[Answer, ...]]:
    """Loss of each held-out example in `store`, and scored answers to the first evaluation.rows of them.

    `base` may be a merged model; `adapter` is an exported plain-LoRA folder for it, or None; both lie where
    every node sees them. Uses the config's model, cluster and evaluation sections and train.micro_batch.
    The result does not depend on the number of actors. Needs ray.init; raises UserError for what does not load, and
    for a reference that the scorer cannot score.
    """
    check(config, store, base.tokenizer)
    width = config.train.micro_batch
    packs = [store[number] for number in range(len(store))]
    asked = questions(store, config.evaluation.rows) if config.evaluation.scorer else []
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))  # similar lengths: less padding
    groups = [order[i : i + ANSWERS_AT_ONCE] for i in range(0, len(order), ANSWERS_AT_ONCE)]
    # Answers take longest: first come, first served.
    works: list[Works] = [tuple(asked[i] for i in group) for group in groups]
    works += [tuple(packs[i : i + width]) for i in range(0, len(packs), width)]
    logger.info(f"held-out rows: {sum(len(pack.segments) for pack in packs)}, of which {len(asked)} are answered")
    done = map_over_actors(partial(Measurer, base.model, adapter, config, base.eos, packs[:8]), works, config)
    answers = dict(pair for group, found in zip(groups, done, strict=False) for pair in zip(group, found, strict=True))
    judged = _judged(config, store, asked, [answers[i] for i in range(len(asked))], base.tokenizer)
    results = RowResults(
        data=store.digest,
        tokens=tuple(size for pack in packs for size in _supervised(pack)),
        losses=tuple(loss for found in done[len(groups) :] for loss in found),
        scores={
            name: {item.row: item.scores[name] for item in judged if name in item.scores}
            for name in scoring.means([item.scores for item in judged])
        },
        origins=origins(store),
    )
    return results, judged


Works = tuple[Pack, ...] | tuple[Question, ...]
"""One piece of work: sequences whose examples' losses are wanted, or questions to be answered."""


class Measurer:
    """One model in an actor, which gives losses and answers."""

    def __init__(
        self, base: BaseModel, adapter: str | None, config: AnyConfig, eos: tuple[int, ...], tried: Sequence[Pack]
    ) -> None:
        """Load the model where this process computes, and test it on sequences.

        Raises UserError if it does not load, or does not pass its self-test.
        """
        self.eos, self.limit, self.device = eos, config.evaluation.max_new_tokens, assigned_device()
        self.model = load(base, adapter, config, self.device)
        self.loss = SupervisedLoss(self.model)
        # The same examples on every actor, so that all choose the same attention.
        self.attention = choose_attention(self.loss, tried, config, self.device).attention

    def __call__(self, work: Works) -> list[Any]:
        """The summed loss of each example of the sequences, or an answer (token ids) to each question."""
        questions = [item for item in work if isinstance(item, Question)]
        if questions:
            with decoding(self.model):
                return greedy(self.model, [item.prompt for item in questions], self.limit, self.eos, self.device)
        packs = [item for item in work if isinstance(item, Pack)]
        each = self.loss.each(collate(packs, self.attention).to(self.device)).double().cpu()
        return [float(part.sum()) for part in each.split([size for pack in packs for size in _supervised(pack)])]


def load(base: BaseModel, adapter: str | None, config: AnyConfig, device: torch.device) -> Any:
    """The frozen model, with the plain-LoRA adapter in its layers if one is given, on `device`.

    With its weights as they are stored, whatever `model.quantization` says: exports are for these.
    Raises UserError if either does not load or they do not fit.
    """
    found: Any = load_model(on_this_node(base, config).folder, config.model, device)
    if adapter is not None:
        unreadable = as_user_error(f"adapter {adapter}: cannot be read", OSError, reason=short_reason)
        with unreadable, node_cache.fetched(adapter) as folder:
            found = _with_adapter(found, folder, adapter)
    return found.to(device)


def _with_adapter(base: Any, folder: Path, adapter: str) -> Any:
    from peft import PeftModel

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"adapter {adapter}: no {name} (does every node see this folder? pickles are not loaded)")
    with as_user_error(f"adapter {adapter}: does not fit the model", ValueError, RuntimeError, KeyError, TypeError):
        wrapped: Any = PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
    # The model itself, with adapted layers in it.
    return wrapped.get_base_model().requires_grad_(False).eval()


def _supervised(pack: Pack) -> list[int]:
    """Number of supervised tokens of each example of a sequence."""
    return [int(part.sum()) for part in np.split(pack.supervised, np.cumsum(pack.segments)[:-1])]


def _judged(
    config: AnyConfig, store: TokenStore, asked: Sequence[Question], answers: Sequence[Sequence[int]], tokenizer: Any
) -> tuple[Answer, ...]:
    """The answers as text, with their scores."""
    if not asked or config.evaluation.scorer is None:
        return ()
    judge = scoring.Judge(config.evaluation.scorer)
    places = [name for index in range(len(store)) for name in store.origins(index)]
    found = []
    for item, ids in zip(asked, answers, strict=True):
        text, reference = as_text(tokenizer, ids), as_text(tokenizer, item.reference)
        found.append(Answer(item.row, places[item.row], text, reference, judge(text, reference)))
    for line in scoring.partial_scores([item.scores for item in found]):
        logger.info(line)
    return tuple(found)
