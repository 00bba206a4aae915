"""Work that all trials of a search share beside the tokens: it is done once, before the first trial.

<search>/shared/METHOD/factors.safetensors, factors.json     of each method of the space, at the largest rank
<search>/shared/METHOD-RANK/ ...                             of a method whose smaller ranks are no part of it
<search>/shared/baseline.json                                loss and answers of the base model on the held-out rows
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from olora_ray.adapter.initialise import check_rank, initialise
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.methods import method_named
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.shared_base import self_test
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import SharedBase, assigned_device, on_cpu
from olora_ray.common import storage
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.text import duration
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.load import override
from olora_ray.sweep.space import Space
from olora_ray.train import reference
from olora_ray.train.data_driven import new_factors
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.held_out import evaluate
from olora_ray.train.loop import Trainer
from olora_ray.train.scoring import Baseline

logger = logging.getLogger(__name__)

# Method and rank of factors.
FactorKey = tuple[str, int]


@dataclass(frozen=True)
class Shared:
    init: float = 0.0
    """Seconds for all factors; 0 if they existed."""
    base: float = 0.0
    """Seconds of the base model's evaluation on the held-out rows; 0 if the result existed."""


def factor_keys(config: DecidedConfig, space: Space) -> list[FactorKey]:
    """Return the factors that all trials share: for each method, the factors of the largest rank."""
    # Smaller ranks are a prefix of the largest for most methods. Other methods need factors of every rank. If the space
    # has a range of ranks, each trial makes these itself.
    ranks = sorted(space.possible("adapter.rank", config.adapter.rank))
    keys = []
    for method in dict.fromkeys(space.possible("adapter.method", config.adapter.method)):
        if method_named(method).prefix:
            keys.append((method, ranks[-1]))
        elif not space.is_range("adapter.rank"):
            keys += [(method, rank) for rank in dict.fromkeys(ranks)]
    return keys


def check_ranks(config: DecidedConfig, space: Space, shapes: Mapping[str, tuple[int, ...]]) -> None:
    rank = max(space.possible("adapter.rank", config.adapter.rank))
    for method in space.possible("adapter.method", config.adapter.method):
        check_rank(shapes, method, rank)


def make(spec: TrainSpec, folder: str, wanted: Sequence[FactorKey]) -> Shared:
    """Write the `wanted` factors, and the base model's held-out loss and answers, into `folder`.

    Needs the memory of one worker. Raises UserError for targets or a rank that the model does not have.
    """
    import torch

    quiet_transformers()
    if spec.config.train.start:
        return Shared()  # the trials continue the adapter of another run, with its factors
    # With fsdp the base model may be too large for one GPU.
    sharded = spec.config.cluster.strategy == "fsdp"
    if sharded:
        spec = on_cpu(spec)
    spec = replace(spec, shared=folder)
    missing = []
    for method, rank in wanted:
        changes = {"adapter.method": method, "adapter.rank": rank}
        factors = replace(spec, config=override(spec.config, changes))
        if not factors.stored_factors().exist():
            missing.append(factors)
    asked = wanted_questions(spec.config.evaluation, spec.eval)
    baseline = storage.join(folder, "baseline.json")
    known = Baseline.read(baseline, spec.baseline_identity(), len(asked))
    measures = known is None and not sharded
    if not missing and not measures:
        return Shared()
    device = torch.device("cpu") if sharded else assigned_device()
    shared = SharedBase.of(spec, device)
    began = time.perf_counter()
    for factors in missing:
        _make_factors(factors, shared)
    between = time.perf_counter()
    if measures:
        self_test(shared, spec)  # with the attention that the trials will have
        _measure(spec, shared).write(baseline, spec.baseline_identity())
    return Shared(between - began, time.perf_counter() - between)


def _make_factors(spec: TrainSpec, shared: SharedBase) -> None:
    adapter = spec.config.adapter
    targets = find_targets(shared.loss.model, adapter.targets, adapter.rank)
    if method_named(adapter.method).needs != "weight":
        self_test(shared, spec)
    factors, _, _ = new_factors(shared.loss, targets, spec.config, spec.train, shared.device)
    spec.stored_factors().write(factors, method_named(adapter.method).prefix)


def _measure(spec: TrainSpec, shared: SharedBase) -> Baseline:
    config = spec.config
    model = shared.loss.model
    # An adapter changes nothing at its start. So the smallest adapter gives the results of the base model.
    targets = find_targets(model, config.adapter.targets, 1)
    factors, _ = initialise(targets, "lora", 1, 0, shared.device)
    adapted = inject(model, factors, 1.0)
    shared.loss.to(shared.device)
    trainer = Trainer(shared.loss, adapted, config, shared.device)
    tested = shared.loss.tested
    assert tested is not None
    # The layout, too: trials name their reference by it.
    attention = tested.layout
    if trainer.objective.reference:
        stores = (spec.train, spec.eval)
        reference.give(trainer, stores, attention, spec.reference_origin(), {})
    loss = means = None
    if spec.eval:
        found = evaluate(trainer, spec.eval, attention)
        loss, means = found.loss, found.means
    answers = None
    asked = wanted_questions(config.evaluation, spec.eval)
    if asked:
        answers = answer(trainer, asked, config.evaluation.max_new_tokens, spec.eos)
    return Baseline(loss, answers, means)


def made(spec: TrainSpec, folder: str, wanted: Sequence[FactorKey], what: str) -> Shared:
    """Run `make` as a Ray task with the resources of one worker; log a line named `what` every minute."""
    resources = worker_resources(spec.config)
    began = time.monotonic()
    remote = ray.remote(make).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
    task = remote.remote(spec, folder, wanted)
    while not ray.wait([task], timeout=60)[0]:
        logger.info(f"{what}: {duration(time.monotonic() - began)} so far")
    with user_errors():
        shared: Shared = ray.get(task)
    return shared
