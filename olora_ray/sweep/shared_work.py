"""Work that the trials of a search share beside the tokens: done once, before the first of them.

<search>/shared/METHOD/factors.safetensors, factors.json     of each method of the space, at the largest rank
<search>/shared/METHOD-RANK/ ...                             of a method whose smaller ranks do not follow from that
<search>/shared/baseline.json                                what the base model does on the held-out rows
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from olora_ray.adapter import initialise as factor_cache
from olora_ray.adapter.initialise import Shape, check, initialise
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.resume import check_base
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import SharedBase, assigned_device, on_cpu
from olora_ray.common import storage
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.text import duration
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.sweep.space import Space
from olora_ray.train.data_driven import new_factors
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.scoring import Baseline

logger = logging.getLogger(__name__)

Kind = tuple[str, int]
"""Method and rank of factors."""


@dataclass(frozen=True)
class Shared:
    """What the work has come to."""

    init: float = 0.0
    """Seconds of all factors; 0 if they were there."""
    base: float = 0.0
    """Seconds of what the base model does on the held-out rows."""
    told: tuple[str, ...] = ()
    """Of each method that looks at data, how much it has looked at; for the log."""


def kinds(config: Config, space: Space) -> list[Kind]:
    """The factors that are made for all trials: of each method, at the largest rank.

    Of a method whose smaller ranks are no prefix, at every rank; at none if the space has a range of them.
    """
    ranks = sorted(space.possible("adapter.rank", config.adapter.rank))
    every = [] if space.is_range("adapter.rank") else ranks
    methods = dict.fromkeys(space.listed("adapter.method", config.adapter.method))
    return [(name, rank) for name in methods for rank in (ranks[-1:] if METHODS[name].prefix else dict.fromkeys(every))]


def check_ranks(config: Config, space: Space, shapes: Mapping[str, Shape]) -> None:
    """Raise UserError that names the layer in which a method cannot have the largest rank of the space."""
    rank = max(space.possible("adapter.rank", config.adapter.rank))
    for method in space.listed("adapter.method", config.adapter.method):
        check(shapes, method, rank)


def make(spec: TrainSpec, place: str, wanted: Sequence[Kind]) -> Shared:
    """Factors of these kinds and the base's held-out loss and answers, in the folder `place`.

    Needs the memory of one worker. Raises UserError for targets or a rank that the model does not have.
    """
    import torch

    quiet_transformers()
    if spec.config.train.start:
        return Shared()  # then the factors are those of another run
    # A base that is to be spread over several GPUs need not fit on one.
    sharded = spec.config.cluster.strategy == "fsdp"
    spec = replace(on_cpu(spec) if sharded else spec, shared=place)
    missing = [one for one in _of_kinds(spec, wanted) if not _is_there(one)]
    asked = wanted_questions(spec.config.evaluation, spec.eval)
    known = Baseline.read(storage.join(place, "baseline.json"), spec.baseline_identity(), len(asked))
    if not missing and (known or sharded):
        return Shared()
    device = torch.device("cpu") if sharded else assigned_device()
    shared = SharedBase.of(spec, device)
    began = time.perf_counter()
    told = [line for one in missing if (line := _make_factors(one, shared))]
    between = time.perf_counter()
    if not known and not sharded:
        check_base(shared.loss, spec, shared.device)  # with the attention that the trials will have
        _measure(spec, shared, place)
    return Shared(between - began, time.perf_counter() - between, tuple(told))


def _of_kinds(spec: TrainSpec, wanted: Sequence[Kind]) -> Iterator[TrainSpec]:
    for method, rank in wanted:
        yield replace(spec, config=override(spec.config, {"adapter.method": method, "adapter.rank": rank}))


def _is_there(spec: TrainSpec) -> bool:
    return factor_cache.has(spec.factor_place(), spec.factor_origin(), spec.config.adapter.rank)


def _make_factors(spec: TrainSpec, shared: SharedBase) -> str | None:
    """Makes and keeps them; returns how much data was looked at, if any was."""
    adapter = spec.config.adapter
    targets = find_targets(shared.loss.model, adapter.targets, adapter.rank)
    if adapter.method not in FROM_WEIGHTS:
        check_base(shared.loss, spec, shared.device)
    factors, _, of_data = new_factors(shared.loss, targets, spec.config, spec.train, shared.device)
    prefix = METHODS[adapter.method].prefix
    factor_cache.write(spec.factor_place(), factors, spec.factor_origin(), adapter.rank, prefix)
    return of_data.line(adapter.method) if of_data else None


def _measure(spec: TrainSpec, shared: SharedBase, place: str) -> None:
    """An adapter at its start changes nothing: with it, here the smallest, the base measures as without."""
    config, model = spec.config, shared.loss.model
    targets = find_targets(model, config.adapter.targets, 1)
    factors, _ = initialise(targets, "lora", 1, 0, shared.device)
    adapted = inject(model, factors, 1.0)
    shared.loss.to(shared.device)
    trainer = Trainer(shared.loss, adapted, config, shared.device)
    attention = str(model.config._attn_implementation)  # type: ignore[union-attr]
    asked = wanted_questions(config.evaluation, spec.eval)
    loss = evaluate(trainer, spec.eval, attention) if spec.eval else None
    answers = answer(trainer, asked, config.evaluation.max_new_tokens, spec.eos) if asked else None
    Baseline(loss, answers).write(storage.join(place, "baseline.json"), spec.baseline_identity())


def made(spec: TrainSpec, place: str, wanted: Sequence[Kind], what: str) -> Shared:
    """Have `make` run in the place of one worker, with a line a minute; `what` it is, for the log."""
    resources = worker_resources(spec.config)
    began = time.monotonic()
    remote = ray.remote(make).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
    task = remote.remote(spec, place, wanted)
    while not ray.wait([task], timeout=60)[0]:
        logger.info(f"{what}: {duration(time.monotonic() - began)} so far")
    with user_errors():
        found: Shared = ray.get(task)
    for line in found.told:
        logger.info(line)
    return found
