"""Work that the trials of a search share beside the tokens: done once, before the first of them.

<search>/shared/factors.safetensors, factors.json     at the largest rank of the space
<search>/shared/baseline.json                         what the base model does on the held-out rows
"""

import time
from dataclasses import replace

from olora_ray.adapter import factor_cache
from olora_ray.adapter.factors import Factors
from olora_ray.adapter.initialise import at_scale
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS
from olora_ray.cluster.device import assigned_device
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.tested_base import check_base
from olora_ray.cluster.worker_context import SharedBase
from olora_ray.common import storage
from olora_ray.common.quiet import quiet_transformers
from olora_ray.config.load import override
from olora_ray.train.baseline import Baseline
from olora_ray.train.generate import answer, wanted_questions
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.new_factors import new_factors


def make(spec: TrainSpec, place: str, rank: int) -> tuple[float, float]:
    """Factors at `rank` and the base's held-out loss and answers, in the folder `place`.

    Returns the seconds that each took; 0 for what was there. Needs the memory of one worker. Raises UserError
    for targets or a rank that the model does not have.
    """
    import torch

    quiet_transformers()
    if spec.config.train.start:
        return 0.0, 0.0  # then the factors are those of another run
    spec = replace(spec, config=override(spec.config, {"adapter.rank": rank}), shared=place)
    asked = wanted_questions(spec.config.evaluation, spec.eval)
    known = Baseline.read(storage.join(place, "baseline.json"), spec.base_identity(), len(asked))
    if known and factor_cache.has(place, spec.factor_origin(), rank):
        return 0.0, 0.0
    # A base that is to be spread over several GPUs need not fit on one.
    sharded = spec.config.cluster.strategy == "fsdp"
    device = torch.device("cpu") if sharded else assigned_device()
    shared = SharedBase.of(spec, device)
    began = time.perf_counter()
    adapter = spec.config.adapter
    targets = find_targets(shared.loss.model, adapter.targets, rank)
    if adapter.method not in FROM_WEIGHTS:
        check_base(shared.loss, spec, device)
    factors, *_ = new_factors(shared.loss, targets, spec.config, spec.train, device)
    factor_cache.write(place, factors, spec.factor_origin(), rank, METHODS[adapter.method].prefix)
    between = time.perf_counter()
    if not known and not sharded:
        _measure(spec, shared, factors, place)
    return between - began, time.perf_counter() - between


def _measure(spec: TrainSpec, shared: SharedBase, factors: dict[str, Factors], place: str) -> None:
    """An adapter at its start changes nothing: with it the base measures as without."""
    config = spec.config
    model = shared.loss.model
    adapted = inject(model, at_scale(factors, config.adapter), config.adapter.scale())
    shared.loss.to(shared.device)
    trainer = Trainer(shared.loss, adapted, config, shared.device)
    attention = str(model.config._attn_implementation)  # type: ignore[union-attr]
    asked = wanted_questions(config.evaluation, spec.eval)
    loss = evaluate(trainer, spec.eval, attention) if spec.eval else None
    answers = answer(trainer, asked, config.evaluation.max_new_tokens, spec.eos) if asked else None
    Baseline(loss, answers).write(storage.join(place, "baseline.json"), spec.base_identity())
