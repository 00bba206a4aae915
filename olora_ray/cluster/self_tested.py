"""The self-test of a worker's model, between its start and the first step."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from olora_ray.cluster.resume import StartingPoint
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import WorkerContext
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train.adapter_test import bare, check_adapters
from olora_ray.train.loader import Waiting, until
from olora_ray.train.loop import train_mode
from olora_ray.train.self_test import choose_attention

logger = logging.getLogger(__name__)

SEQUENCES = 8
"""Of these the examples are taken."""


def self_tested(
    context: WorkerContext, spec: TrainSpec, start: StartingPoint, waiting: Waiting | None = None
) -> StartingPoint:
    """The starting point with the attention that has passed; all workers must call it together.

    A base that several adapters share is tested once. `waiting` as of StepLoader. Raises UserError with what to set
    instead if the model, or this kind of training of it, is not right.
    """
    problem, name = None, start.attention
    try:
        name = _attention(context, spec, start, _sequences(spec, waiting))
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)  # on other GPUs it may have gone well
    return replace(start, attention=name)


def _attention(context: WorkerContext, spec: TrainSpec, start: StartingPoint, packs: Sequence[Pack]) -> str:
    """The one that has passed."""
    loss, adapted = start.trainer.loss, start.trainer.adapted
    train_mode(adapted, False)
    with context.activate(adapted):
        if loss.tested is None:
            with bare(loss.model):
                loss.tested = choose_attention(loss, packs, spec.config, context.device)
            logger.info(loss.tested.line())
        name = loss.tested.attention
        check_adapters(loss, adapted, packs, name, context.device, new=not start.trained)
    return name


def _sequences(spec: TrainSpec, waiting: Waiting | None) -> Sequence[Pack]:
    """The first sequences of the training, the same on every worker."""
    store: TokenStore = spec.train
    until(store, lambda: store.available >= SEQUENCES or store.total is not None, waiting)
    return [store[number] for number in range(min(SEQUENCES, store.available))]
