"""The self-test of a base model on a worker: once for each base, before anything is made of what it computes."""

import logging
from collections.abc import Sequence

import torch

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import collectives
from olora_ray.common.errors import UserError
from olora_ray.tokens.store import Pack, TokenStore
from olora_ray.train.adapter_test import bare
from olora_ray.train.loader import Waiting, until
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import choose_attention, require_layout
from olora_ray.train.self_test_result import SelfTest

logger = logging.getLogger(__name__)

SEQUENCES = 8
"""Of these the examples are taken."""


def first_sequences(spec: TrainSpec, waiting: Waiting | None = None) -> Sequence[Pack]:
    """The first sequences of the training, the same on every worker; `waiting` as of StepLoader."""
    store: TokenStore = spec.train
    until(store, lambda: store.available >= SEQUENCES or store.total is not None, waiting)
    return [store[number] for number in range(min(SEQUENCES, store.available))]


def tested(loss: SupervisedLoss, spec: TrainSpec, packs: Sequence[Pack], device: torch.device) -> SelfTest:
    """What the self-test finds of the base, which has then the attention that has passed; raises UserError.

    Its adapters, if it has some, take no part. All workers of a sharded base must call it together.
    """
    if loss.tested is None:
        with bare(loss.model):
            loss.tested = choose_attention(loss, packs, spec.config, device)
        logger.info(loss.tested.line())
    else:
        require_layout(loss, spec.config)
    return loss.tested


def check_base(loss: SupervisedLoss, spec: TrainSpec, device: torch.device, waiting: Waiting | None = None) -> None:
    """`tested` for a base that has no adapters yet; all workers must call it together, and all raise what one does."""
    problem = None
    try:
        tested(loss, spec, first_sequences(spec, waiting), device)
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)  # on other GPUs it may have gone well
