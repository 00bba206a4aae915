"""Held-out loss and answers of one model, row by row, spread over the cluster."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olora_ray.cluster.device import assigned_device
from olora_ray.common import copies
from olora_ray.common.errors import UserError, first_line, short_reason
from olora_ray.config.evaluation import AnyConfig
from olora_ray.evaluation import pool
from olora_ray.evaluation.groups import origins
from olora_ray.evaluation.rows import RowResults
from olora_ray.model import load as load_module
from olora_ray.model import source
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.answers import as_text, check
from olora_ray.pipeline.base import Base
from olora_ray.tokens.collate import collate
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train import scoring
from olora_ray.train.generate import Question, decoding, greedy, questions
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import choose_attention

logger = logging.getLogger(__name__)

ANSWERS_AT_ONCE = 20
TRIED = 8
"""Sequences from which the self-test takes its examples."""
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    done = pool.map_over_actors(partial(Measurer, base.model, adapter, config, base.eos, packs[:TRIED]), works, config)
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
        return self._losses([item for item in work if isinstance(item, Pack)])

    def _losses(self, packs: Sequence[Pack]) -> list[float]:
        each = self.loss.each(collate(packs, self.attention).to(self.device)).double().cpu()
        return [float(part.sum()) for part in each.split([size for pack in packs for size in _supervised(pack)])]


def load(base: BaseModel, adapter: str | None, config: AnyConfig, device: torch.device) -> Any:
    """The frozen model, with the plain-LoRA adapter in its layers if one is given, on `device`.

    With its weights as they are stored, whatever `model.quantization` says: exports are for these.
    Raises UserError if either does not load or they do not fit.
    """
    folder = source.on_this_node(base, config).folder
    found: Any = load_module.load_model(folder, config.model, device)
    return (_adapted(found, adapter) if adapter else found).to(device)


def _adapted(base: nn.Module, adapter: str) -> nn.Module:
    try:
        with copies.fetched(adapter) as folder:
            return _with_adapter(base, folder, adapter)
    except OSError as error:
        raise UserError(f"adapter {adapter}: cannot be read: {short_reason(error)}") from None


def _with_adapter(base: nn.Module, folder: Path, adapter: str) -> nn.Module:
    from peft import PeftModel

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"adapter {adapter}: no {name} (does every node see this folder? pickles are not loaded)")
    wrap: Any = PeftModel.from_pretrained
    try:
        wrapped = wrap(base, str(folder), use_safetensors=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"adapter {adapter}: does not fit the model: {first_line(error)}") from None
    inner: nn.Module = wrapped.get_base_model()  # the model itself, with adapted layers in it
    return inner.requires_grad_(False).eval()


def _supervised(pack: Pack) -> list[int]:
    """Number of supervised tokens of each example of a sequence."""
    counts, place = [], 0
    for size in pack.segments:
        counts.append(int(pack.supervised[place : place + size].sum()))
        place += size
    return counts


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
