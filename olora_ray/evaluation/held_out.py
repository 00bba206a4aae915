"""Held-out loss and answers of one model, row by row, computed by actors all over the cluster."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch

from olora_ray.adapter.peft_folder import CONFIG as ADAPTER_CONFIG
from olora_ray.adapter.peft_folder import WEIGHTS as ADAPTER_WEIGHTS
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.worker_context import assigned_device, platform_of
from olora_ray.common import node_cache
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.decided import AnyDecided
from olora_ray.config.load import override
from olora_ray.config.schema import AnyConfig, Model
from olora_ray.evaluation.groups import origins
from olora_ray.evaluation.rows import RowResults
from olora_ray.model.load import load_model, pick_dtype
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.pipeline.answers import as_text, check_answers
from olora_ray.pipeline.base import Base
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import reference, scoring
from olora_ray.train.generate import Question, greedy, questions
from olora_ray.train.held_out import held_out
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.objectives.objective import objective_of
from olora_ray.train.self_test import choose_attention

logger = logging.getLogger(__name__)

# Actors load the model once and then do pieces of work. Ray Data is not used, because it passes the arguments of its
# actors through Ray's object store, and Ray's C++ log prints a warning for each such actor.


Work = TypeVar("Work")
Result = TypeVar("Result")


def map_over_actors(
    make: Callable[[], Callable[[Work], Result]], works: Sequence[Work], config: AnyDecided
) -> list[Result]:
    """Return the results of all `works`, in their order.

    Each actor calls `make` once, and calls the function that it returns once per work. `make` must pickle, and its
    function must give the same result on every actor; a warning is logged if model.dtype=auto picks several precisions.
    Starts at most cluster.workers actors, fewer if the cluster has no room. Each has cluster.cpus_per_worker CPUs (and
    as many threads) and cluster.gpus_per_worker GPUs. Needs ray.init; raises the UserError of a work.
    """
    if not works:
        return []
    import ray

    wanted = worker_resources(config)
    threads = max(1, math.floor(config.cluster.cpus_per_worker))
    # `make` travels with each work instead of with the actor's start: when Ray restarts an actor after a node died, the
    # arguments of the start may be lost with that node.
    actor_type: Any = ray.remote(max_restarts=-1, max_task_retries=-1)(_Actor)
    actor_type = actor_type.options(num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0))
    actors = [actor_type.remote() for _ in range(min(len(works), config.cluster.most))]
    made_of = ray.put((make, threads, config.model))
    numbers = iter(range(len(works)))
    results: dict[int, Result] = {}
    precisions: set[str] = set()
    # An actor without room in the cluster never answers `ready`, so it is never given work.
    pending: dict[Any, tuple[Any, int | None]] = {
        actor.ready.remote(): (actor, None) for actor in actors
    }
    try:
        while len(results) < len(works):
            [answer], _ = ray.wait(list(pending))
            actor, number = pending.pop(answer)
            if number is not None:
                result, precision = ray.get(answer)
                if isinstance(result, UserError):
                    raise result
                results[number] = result
                precisions.add(precision)
                # Ten lines, one at each tenth of the works.
                if len(works) >= 10 and 10 * len(results) % len(works) < 10:
                    logger.info(f"evaluation: {len(results) / len(works):.0%} done")
            number = next(numbers, None)
            if number is not None:
                pending[actor.run.remote(made_of, works[number])] = actor, number
            else:
                # No work is left for this actor. An actor that Ray restarts elsewhere may need the room.
                ray.kill(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
    if len(precisions) > 1:
        logger.warning(
            f"model.dtype=auto: some rows were measured in {' and others in '.join(sorted(precisions))}, depending on"
            " the node; set model.dtype, or use nodes with the same hardware"
        )
    return [results[number] for number in range(len(works))]


class _Actor:
    """Actor that runs one work after the other; it returns a UserError as a result, so that Ray does not wrap it."""

    made: Callable[[Any], Any] | None = None
    precision = ""

    def ready(self) -> None:
        """Return as soon as the cluster has room for this actor."""

    def run(
        self, made_of: tuple[Callable[[], Callable[[Any], Any]], int, Model], work: Any
    ) -> tuple[Any, str]:
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
    row: int
    """Index of the example in the store."""
    origin: str
    """FILE:LINE of the row."""
    text: str
    reference: str
    scores: Mapping[str, float]
    prompt: str = ""
    """With its special tokens."""

    def as_row(self) -> scoring.Row:
        return {"prompt": self.prompt, "reference": self.reference, "answer": self.text}


def measure(
    base: Base,
    adapter: str | None,
    store: TokenStore,
    config: AnyDecided,
    base_of_pairs: Callable[[], BaseModel] | None = None,
) -> tuple[RowResults, tuple[Answer, ...]]:
    """Return the loss of each held-out example in `store`, and scored answers to the first evaluation.rows of them.

    `base` may be a merged model; `adapter` is an exported plain-LoRA folder for it, or None. Every node must be able to
    read both. Preference pairs are measured against the model that `base_of_pairs` returns (None: `base`), which must
    be the same for all models that are compared. Uses the config's model, cluster and evaluation sections and
    train.micro_batch. The result does not depend on the number of actors. Needs ray.init. Raises UserError if a file
    does not load, or if the scorer cannot score a reference.
    """
    check_answers(config, store, base.tokenizer)
    width = config.train.micro_batch
    if store.has_pairs:
        if not objective_of(config.train).reference:
            # Only the rows tell it where the formats of a config are `auto`.
            config = override(config, {"train.objective": "pairs"})
        model = base_of_pairs() if base_of_pairs else base.model
        _give_reference(store, model, base.eos, config)
    packs = [store[number] for number in range(len(store))]
    asked: Sequence[Question] = []
    if config.evaluation.scorer:
        asked = questions(store, config.evaluation.rows)
    # Prompts of similar length are answered together, because shorter ones are padded to the longest.
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
    groups = [order[i : i + ANSWERS_AT_ONCE] for i in range(0, len(order), ANSWERS_AT_ONCE)]
    # Answers take longest, so actors start with them; otherwise the last actor would answer while all others idle.
    works: list[Works] = [tuple(asked[i] for i in group) for group in groups]
    works += [tuple(packs[i : i + width]) for i in range(0, len(packs), width)]
    logger.info(
        f"held-out rows: {sum(len(pack.examples()) for pack in packs)}; {len(asked)} of them are answered"
    )
    make = partial(Measurer, base.model, adapter, config, base.eos, packs[:8])
    done = map_over_actors(make, works, config)
    answers: dict[int, Sequence[int]] = {}
    for group, part in zip(groups, done, strict=False):
        answers |= zip(group, part, strict=True)
    judged = _judged(config, store, asked, [answers[i] for i in range(len(asked))], base.tokenizer)
    scores: dict[str, dict[int, float]] = {}
    for name in scoring.means([item.scores for item in judged]):
        scores[name] = {item.row: item.scores[name] for item in judged if name in item.scores}
    scorer = config.evaluation.scorer
    kept: dict[int, scoring.Row] = {}
    if scorer and scoring.Judge(scorer).takes_all:
        kept = {item.row: item.as_row() for item in judged}
    objective = objective_of(config.train)
    examples = chain.from_iterable(pack.examples() for pack in packs)
    numbers = chain.from_iterable(done[len(groups) :])
    rows = [*map(objective.of_row, numbers, examples)]
    for number, row in enumerate(rows):
        for name, value in row.scores.items():
            scores.setdefault(name, {})[number] = value
    results = RowResults(
        data=store.digest,
        tokens=tuple(row.weight for row in rows),
        losses=tuple(row.loss for row in rows),
        scores=scores,
        origins=origins(store),
        perplexity=objective.perplexity,
        answers=kept,
        scorer=scorer if kept else None,
    )
    return results, judged


def _give_reference(
    store: TokenStore, model: BaseModel, eos: tuple[int, ...], config: AnyDecided
) -> None:
    """Give the store the losses of `model`, from the file beside it or by a pass on all actors."""
    width = config.train.micro_batch
    store.reference = ()
    packs = [store[number] for number in range(len(store))]

    def measure() -> Iterable[tuple[float, ...]]:
        works = [tuple(packs[i : i + width]) for i in range(0, len(packs), width)]
        make = partial(Measurer, model, None, config, eos, packs[:8])
        done = map_over_actors(make, works, config)
        return reference.of_packs(packs, chain.from_iterable(done))

    named = {
        "base model": model.digest,
        "start": "",
        "computed by": ", ".join(computed_by(config)),
        "sequences at once": str(width),
    }
    store.reference = [tuple(losses) for losses in reference.kept(store, named, measure).losses]


def computed_by(config: AnyConfig) -> list[str]:
    """Return precision, attention and device of an evaluation, as far as they are known without Ray.

    A result in bfloat16 on a GPU cannot be compared with one in float32 on a CPU. attention=auto needs no resolution
    here: it depends only on device, precision, libraries and files.
    """
    gpus = config.cluster.gpus_per_worker
    device = torch.device("cpu")
    if gpus and torch.cuda.is_available():
        device = torch.device("cuda", 0)
    return [
        str(pick_dtype(config.model, device)),
        config.model.attention,
        str(gpus),
        *(text for name, text in platform_of(device).items() if name != "threads"),
    ]


Works = tuple[Pack, ...] | tuple[Question, ...]
"""One piece of work: sequences whose losses to measure, or questions to answer."""


class Measurer:
    """One model in an actor, which computes losses and answers."""

    def __init__(
        self,
        base: BaseModel,
        adapter: str | None,
        config: AnyDecided,
        eos: tuple[int, ...],
        tried: Sequence[Pack],
    ) -> None:
        """Load the model on this process's device, and test it on the sequences `tried`.

        Raises UserError if it does not load, or fails its self-test.
        """
        self.eos = eos
        self.limit = config.evaluation.max_new_tokens
        self.device = assigned_device()
        self.model = load_adapted(base, adapter, config, self.device)
        self.loss = SupervisedLoss(self.model)
        # All actors test the same examples, so that all choose the same attention and compute the same bits.
        self.attention = choose_attention(self.loss, tried, config, self.device).attention
        self.objective = objective_of(config.train)

    def __call__(self, work: Works) -> list[Any]:
        """Return the numbers of each example in the sequences (`Objective.each`), or the answer to each question."""
        questions = [item for item in work if isinstance(item, Question)]
        if questions:
            prompts = [item.prompt for item in questions]
            return greedy(self.model, prompts, self.limit, self.eos, self.device)
        packs = [item for item in work if isinstance(item, Pack)]
        found = held_out(
            self.loss, packs, self.objective, self.attention, width=len(packs), each=True
        )
        numbers: list[Any] = found.numbers.tolist()
        return numbers


def load_adapted(
    base: BaseModel, adapter: str | None, config: AnyConfig, device: torch.device
) -> Any:
    """Return the frozen model on `device`, with the plain-LoRA adapter in its layers if one is set.

    Loads the weights as they are stored and ignores model.quantization, because exports are made for these weights.
    Raises UserError if either does not load, or if the adapter does not fit the model.
    """
    model: Any = load_model(on_this_node(base, config).folder, config.model, device)
    if adapter is None:
        return model.to(device)
    from peft import PeftModel

    unreadable = as_user_error(f"adapter {adapter}: cannot be read", OSError, reason=short_reason)
    with unreadable, node_cache.fetched(adapter) as folder:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(
                    f"adapter {adapter}: no {name}; use a PEFT folder with safetensors that all nodes can read"
                )
        unfit = f"adapter {adapter}: does not fit its model"
        with as_user_error(unfit, ValueError, RuntimeError, KeyError, TypeError):
            wrapped: Any = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    # PEFT puts the adapted layers into the model itself. Its wrapper is dropped, because the loss needs the backbone.
    return wrapped.get_base_model().requires_grad_(False).eval().to(device)


def _judged(
    config: AnyDecided,
    store: TokenStore,
    asked: Sequence[Question],
    answers: Sequence[Sequence[int]],
    tokenizer: Any,
) -> tuple[Answer, ...]:
    if not asked or config.evaluation.scorer is None:
        return ()
    judge = scoring.Judge(config.evaluation.scorer)
    origin_of = list(chain.from_iterable(map(store.origins, range(len(store)))))
    judged = []
    for item, ids in zip(asked, answers, strict=True):
        text = as_text(tokenizer, ids)
        reference = as_text(tokenizer, item.reference)
        scores = judge(text, reference)
        prompt = as_text(tokenizer, item.prompt, special=True)
        judged.append(Answer(item.row, origin_of[item.row], text, reference, scores, prompt))
    judge.tell_partial([item.scores for item in judged])
    return tuple(judged)
