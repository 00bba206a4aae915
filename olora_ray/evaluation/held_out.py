"""Held-out loss and answers of one model, row by row, spread over the cluster."""

import logging
import math
import pickle
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

# Pieces of work spread over the cluster by Ray Data, done by actors that load a model once.


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
    import ray.data

    from olora_ray.tokens.prepare import quiet_stream

    wanted = worker_resources(config)
    count = min(len(works), config.cluster.max_workers())
    threads = max(1, math.floor(config.cluster.cpus_per_worker))
    with quiet_stream():
        rows = [{"number": number, "work": pickle.dumps(work)} for number, work in enumerate(works)]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(make, threads, config.model),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
        )
        found: dict[int, bytes] = {}
        precisions = set()
        for row in done.iter_rows():
            found[row["number"]] = row["result"]
            precisions.add(row["precision"])
            if len(works) >= 10 and 10 * len(found) // len(works) > 10 * (len(found) - 1) // len(works):  # each tenth
                logger.info(f"evaluation: {len(found) / len(works):.0%} done")
    if len(precisions) > 1:
        logger.warning(
            f"model.dtype: auto: measured in {' and '.join(sorted(precisions))}, each row in that of the node which"
            " measured it; use nodes of one kind, or set it"
        )
    # Made by our own actors a moment ago.
    results = [pickle.loads(found[number]) for number in range(len(works))]  # noqa: S301
    for result in results:
        if isinstance(result, UserError):
            raise result
    return results


class _Actor:
    """Runs one work after the other; a UserError is a result, so that Ray does not wrap it."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], threads: int, model: Model) -> None:
        torch.set_num_threads(threads)
        quiet_transformers()
        self.problem: UserError | None = None
        self.precision = ""
        try:
            self.run = make()
            self.precision = str(pick_dtype(model, assigned_device())).removeprefix("torch.")
        except UserError as error:
            self.problem = error

    def __call__(self, batch: Any) -> dict[str, Any]:
        """One row {number, work} -> one row {number, result, precision}."""
        numbers, results = batch.column("number").to_pylist(), []
        for work in batch.column("work").to_pylist():
            try:
                results.append(pickle.dumps(self.problem or self.run(pickle.loads(work))))  # noqa: S301
            except UserError as error:
                results.append(pickle.dumps(error))
        return {"number": numbers, "result": results, "precision": [self.precision] * len(numbers)}


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
