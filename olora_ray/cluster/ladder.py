"""The widest micro-batch, tried on the GPU of each worker before the first step, where `auto` leaves a choice.

The plan (cluster/decide.py) knows sizes. It does not know fragments, the memory of libraries, or another program on the
GPU. So each worker runs a micro-batch of full length. If one of them lacks memory, all take the next rung: they make
two results of each MLP again in the backward pass, then whole blocks, then halve the micro-batch. Recomputation comes
first, because it changes no bit of the result.

The checkpoints hold the rung (`TrainState.rung`). A resumed run keeps the micro-batch with which it began.

Not tried, so that the plan stands alone: CPUs; a sharded base, whose workers would wait in the middle of a pass for the
one that failed; and a base that several trials share, because each of them would choose for all.
"""

import logging
from collections.abc import Collection
from dataclasses import replace

import torch

from olora_ray.cluster.decide import MICRO, RECOMPUTE, RUNGS
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.start import StartingPoint, self_tested
from olora_ray.cluster.worker_context import SharedBaseContext, WorkerContext
from olora_ray.common import collectives
from olora_ray.common.device import lacks_memory
from olora_ray.config.decided import DecidedTrain, Recompute
from olora_ray.config.load import at, override
from olora_ray.train import parallel
from olora_ray.train.estimate import widest
from olora_ray.train.loop import Trainer

logger = logging.getLogger(__name__)

AGAIN: tuple[Recompute, ...] = (False, *RUNGS)


def fitted(
    context: WorkerContext, spec: TrainSpec, start: StartingPoint
) -> tuple[TrainSpec, StartingPoint]:
    """Return the spec and the starting point with the first rung that fits on all GPUs, self-tested there.

    At the last rung nothing is tried: the first step fails with advice (cluster/device_errors.py). All workers must
    call it together.
    """
    free = {MICRO, RECOMPUTE} & set(spec.auto)
    kept = {name: value for name, value in start.state.rung.items() if name in free}
    spec = _at(spec, start, kept)
    start = self_tested(context, spec, start)
    shared = isinstance(context, SharedBaseContext) or start.trainer.loss.sharded
    if context.device.type != "cuda" or shared:
        return spec, start
    if start.resumed:
        free.discard(MICRO)
    tested = spec
    while lower := _lower(spec.config.train, free):
        if all(collectives.gather(_fits(context, spec, start))):
            break
        torch.cuda.empty_cache()
        for name, value in lower.items():
            tried = str(at(spec.config, name)).lower()
            logger.info(
                f"{name}=auto: {tried} needs more memory than the GPU of a worker has; trying {str(value).lower()}"
            )
        spec = _at(spec, start, lower)
    start.state.rung = {name: at(spec.config, name) for name in (MICRO, RECOMPUTE)}
    if spec is not tested:
        start = self_tested(context, spec, start)
    return spec, start


def _at(spec: TrainSpec, start: StartingPoint, rung: dict[str, int | str | bool]) -> TrainSpec:
    config = override(spec.config, rung)
    start.trainer.config = config
    start.trainer.loss.recompute = config.train.activation_checkpointing
    parallel.install(start.trainer.loss)
    return replace(spec, config=config)


def _lower(train: DecidedTrain, free: Collection[str]) -> dict[str, int | str | bool]:
    """Return the change to the next rung; empty at the last one."""
    again = train.activation_checkpointing
    if RECOMPUTE in free and again is not True:
        return {RECOMPUTE: AGAIN[AGAIN.index(again) + 1]}
    if MICRO in free and train.micro_batch > 1:
        return {MICRO: -(-train.micro_batch // 2)}
    return {}


def _fits(context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> bool:
    """Run what takes the memory of a step: the exchange, and then both passes of a micro-batch of full length."""
    trainer = start.trainer
    loss = trainer.loss
    device = context.device
    assert loss.tested is not None
    _exchange(trainer)  # first, so that what it takes for good is missing below
    trainer.set_training(True)
    try:
        batch = widest(spec.config, loss.tested.attention)
        with context.activate(trainer.adapted):
            loss(batch.to(device)).backward()
        torch.cuda.synchronize(device)  # a GPU tells its errors later
    except RuntimeError as error:
        if not lacks_memory(error, device):
            raise
        return False
    finally:
        trainer.set_training(False)
        trainer.flat.grad.zero_()
    return True


def _exchange(trainer: Trainer) -> None:
    """Sum gradients of zero over the micro-batches of a step, as a step does."""
    count = trainer.config.train.micro_batches()
    trainer.gradient.begin(count)
    for number in collectives.share(count, collectives.rank(), collectives.world_size()):
        with trainer.gradient.leaf(number):
            pass
    trainer.gradient.finish()
