"""The self-test of a worker's model, between its start and the first step; not again where it has passed before.

It takes as long as some steps. What was found with the same model, data, adapter and settings, on such a device and
processor and by the same versions, stands in the checkpoint from which a worker resumes, and is kept on the node
for the next run. Anything else could compute otherwise, and is tested.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from olora_ray.cluster.resume import StartingPoint
from olora_ray.cluster.spec import TrainSpec, first_sequences, tested
from olora_ray.cluster.worker_context import WorkerContext
from olora_ray.cluster.worker_platforms import kind_of
from olora_ray.common import collectives, node_cache
from olora_ray.common.errors import UserError
from olora_ray.tokens.store import Pack
from olora_ray.train.loader import Waiting
from olora_ray.train.loop import train_mode
from olora_ray.train.loss import SelfTest
from olora_ray.train.self_test import check_adapters, require_layout

logger = logging.getLogger(__name__)

_FOUND = TypeAdapter(SelfTest)


def self_tested(
    context: WorkerContext, spec: TrainSpec, start: StartingPoint, waiting: Waiting | None = None
) -> StartingPoint:
    """The starting point with the attention that has passed; all workers must call it together.

    A base that several adapters share is tested once. `waiting` as of StepLoader. Raises UserError with what to set
    instead if the model, or this kind of training of it, is not right.
    """
    used = what_computes(context, spec, next(start.trainer.loss.model.parameters()).dtype)
    place = _place(spec, used)
    known = passed(start, used) or _kept(place)
    if all(collectives.gather(known is not None)):  # a sharded base needs all of them for a test
        assert known is not None
        start.state.self_test = {"with": used, "found": known.to_json()}
        return replace(start, attention=_adopt(context, spec, start, known))
    problem, name = None, start.attention
    try:
        name = _attention(context, spec, start, first_sequences(spec, waiting))
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)  # on other GPUs it may have gone well
    found = start.trainer.loss.tested
    assert found is not None
    start.state.self_test = {"with": used, "found": found.to_json()}
    if place is not None:
        node_cache.keep(place, json.dumps(found.to_json()))
    return replace(start, attention=name)


def what_computes(context: WorkerContext, spec: TrainSpec, dtype: torch.dtype) -> dict[str, str]:
    """All that decides, beside a run's identity, what a worker's model, which is of this `dtype`, makes of its data."""
    model = spec.config.model.model_dump(mode="json", exclude={"name"})
    return kind_of(context.device) | {
        "code": node_cache.code(),
        "model": json.dumps(model, sort_keys=True),
        "precision": str(dtype),  # of `auto` the other workers decide too
        "strategy": spec.config.cluster.strategy,
        "recompute": str(spec.recompute),
        "micro-batch": str(spec.config.train.micro_batch),
    }


def passed(start: StartingPoint, used: dict[str, str]) -> SelfTest | None:
    """What a checkpoint says was found with just this; None if that was something else, or never."""
    noted: Any = start.state.self_test
    if not start.resumed or not isinstance(noted, dict) or noted.get("with") != used:
        return None
    try:
        return _FOUND.validate_python(noted.get("found"))
    except ValidationError:
        return None


def _place(spec: TrainSpec, used: dict[str, str]) -> str | None:
    """The file of this node that keeps what was found; None for a model whose digest may not have all its code."""
    if not spec.base.digest or spec.config.model.trust_remote_code:
        return None
    return node_cache.place("self-tests", *(json.dumps(part, sort_keys=True) for part in (used, spec.identity())))


def _kept(place: str | None) -> SelfTest | None:
    """What an earlier run on this node has found."""
    text = node_cache.read(place) if place is not None else None
    try:
        return None if text is None else _FOUND.validate_json(text)
    except ValidationError:
        return None


def _adopt(context: WorkerContext, spec: TrainSpec, start: StartingPoint, known: SelfTest) -> str:
    """Give the base the attention that has passed, unless another adapter has done so; its name."""
    loss: Any = start.trainer.loss
    train_mode(start.trainer.adapted, False)
    if loss.tested is None:
        with context.activate(start.trainer.adapted):
            loss.model.set_attn_implementation(known.attention)
        loss.given_masks, loss.tested = known.given_masks, known
        logger.info(f"self-test: has passed before, with attention={known.attention}")
    else:
        require_layout(loss, spec.config)
    return str(loss.tested.attention)


def _attention(context: WorkerContext, spec: TrainSpec, start: StartingPoint, packs: Sequence[Pack]) -> str:
    """The one that has passed."""
    loss, adapted = start.trainer.loss, start.trainer.adapted
    train_mode(adapted, False)
    with context.activate(adapted):
        name = tested(loss, spec, packs, context.device).attention
        check_adapters(loss, adapted, packs, name, context.device, new=not start.trained)
    return name
