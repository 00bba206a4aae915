"""The self-test of a worker's model, between its start and the first step."""

from collections.abc import Sequence
from dataclasses import replace

from olora_ray.cluster.resume import StartingPoint
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.tested_base import first_sequences, tested
from olora_ray.cluster.worker_context import WorkerContext
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.store import Pack
from olora_ray.train.adapter_test import check_adapters
from olora_ray.train.loader import Waiting
from olora_ray.train.loop import train_mode


def self_tested(
    context: WorkerContext, spec: TrainSpec, start: StartingPoint, waiting: Waiting | None = None
) -> StartingPoint:
    """The starting point with the attention that has passed; all workers must call it together.

    A base that several adapters share is tested once. `waiting` as of StepLoader. Raises UserError with what to set
    instead if the model, or this kind of training of it, is not right.
    """
    problem, name = None, start.attention
    try:
        name = _attention(context, spec, start, first_sequences(spec, waiting))
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)  # on other GPUs it may have gone well
    return replace(start, attention=name)


def _attention(context: WorkerContext, spec: TrainSpec, start: StartingPoint, packs: Sequence[Pack]) -> str:
    """The one that has passed."""
    loss, adapted = start.trainer.loss, start.trainer.adapted
    train_mode(adapted, False)
    with context.activate(adapted):
        name = tested(loss, spec, packs, context.device).attention
        check_adapters(loss, adapted, packs, name, context.device, new=not start.trained)
    return name
