"""The starting point of a worker, and the self-test of its model there.

A worker starts from the newest good checkpoint, else from the adapter of train.start, else from new factors.
"""

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olora_ray.adapter.initialise import InitReport, at_scale
from olora_ray.adapter.inject import find_targets, install, remove, wrap
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.methods import method_named
from olora_ray.adapter.optimizers.optimizer import optimizer_named
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import (
    SharedBaseContext,
    WorkerContext,
    common_dtype,
    platform_of,
)
from olora_ray.common import collectives, node_cache, records
from olora_ray.common.device import is_of_gpu, lacks_memory
from olora_ray.common.errors import StoreUnavailable, TryAgain, UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.common.text import plural, some
from olora_ray.config.section import is_auto
from olora_ray.tokens.plan import Pack
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import Checkpoint, TrainState
from olora_ray.train.data_driven import new_factors, sizes_of
from olora_ray.train.loader import planned_steps
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SelfTest, SupervisedLoss
from olora_ray.train.parallel import place_model
from olora_ray.train.self_test import check_adapters, choose_attention, require_layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """A trainer with the adapter and the optimizer after `state.step` steps."""

    trainer: Trainer
    attention: str
    """The base model's attention implementation and the layout of batches, as `collate` takes them."""
    state: TrainState
    best: Tensor | None
    """The flat vector of the best evaluation so far."""
    resumed: bool
    """True if it comes from a checkpoint of this run."""
    trained: bool = False
    """True if the adapter is already trained, in this run or at train.start."""


def starting_point(context: WorkerContext, spec: TrainSpec, folder: str) -> StartingPoint:
    """Return the starting point of a worker. `folder` has the run's checkpoints.

    All workers must call it together. Raises UserError if the checkpoint, the adapter of train.start or the base model
    cannot be used.
    """
    restart = restored(spec, folder)
    if restart is None:
        start = start_adapter(spec)
        known = start
        state = TrainState()
    else:
        start = None
        known = restart.adapter
        state = restart.state
    adapter = spec.config.adapter
    state.precision = _precision(context, spec, state.precision)
    with context.activate({}):
        loss = context.base(spec, state.precision)
        model: Any = loss.model
        sizes = {}
        # Sizes come before the factors, because a method may shard the base.
        if restart is None and optimizer_named(spec.config.train.optimizer).sizes:
            measured = known or find_targets(model, adapter.targets, adapter.rank)
            sizes = sizes_of(loss, measured, context.device)
        new = factors(context, spec, loss, known)
        adapted = wrap(model, new, adapter.scale(), adapter.dropout)
        attention: str = model.config._attn_implementation
    with context.activate(adapted):
        cluster = spec.config.cluster
        place_model(loss, cluster.strategy, context.device, cluster.fsdp_replicas)
        trainer = Trainer(loss, adapted, spec.config, context.device, sizes=sizes)
    if restart:
        best = resume(trainer, restart)
        return StartingPoint(trainer, attention, state, best, resumed=True, trained=True)
    if start:
        trainer.flat.load(trainer.flat.vector, named(start))
    return StartingPoint(trainer, attention, state, None, resumed=False, trained=start is not None)


def _precision(context: WorkerContext, spec: TrainSpec, began: str | None) -> str:
    if not isinstance(context, SharedBaseContext) or context.dtype is None:
        return common_dtype(spec.config, context.device, began)
    shared = context.dtype
    if began not in (None, shared):
        logger.warning(
            f"model.dtype=auto: this trial started in {began}, but the base model that trials share here is in"
            f" {shared}, so its losses mix both precisions; use nodes with equal hardware, or set model.dtype"
        )
    return shared


def restored(spec: TrainSpec, folder: str) -> Checkpoint | None:
    """Return the newest good checkpoint, the same on all workers.

    Raises UserError if it belongs to another base, data or adapter, and StoreUnavailable, so that Ray restarts the
    workers, if the storage does not answer.
    """
    # Rank 0 chooses the checkpoint, because the other workers may see an older state of the storage.
    rank = collectives.rank()
    try:
        newest = checkpoints.latest_good(folder) if rank == 0 else None
    except TryAgain as error:
        raise StoreUnavailable(str(error)) from None
    path = collectives.from_first(newest[0] if newest else None)
    if path is None:
        return None
    subject = f"run.storage: worker {rank} cannot read the checkpoint that worker 0 can read"
    try:
        chosen = collectives.together(lambda: newest[1] if newest else _read(path, subject))
    except TryAgain as error:
        raise StoreUnavailable(str(error)) from None
    checkpoint.require_same(chosen.identity, spec.identity(), path)
    return chosen


def _read(path: str, subject: str) -> Checkpoint:
    try:
        return checkpoints.read(path)
    except TryAgain as error:
        raise TryAgain(f"{subject}: {error}") from None
    except UserError as error:
        raise UserError(f"{subject}: {error}") from None


def start_adapter(spec: TrainSpec) -> dict[str, AdapterWeights] | None:
    """Return the adapter of train.start; raises UserError if it has another base model or other settings."""
    path = spec.config.train.start
    if path is None:
        return None
    start = collectives.together(lambda: _read(path, "train.start"))
    wanted = spec.identity()
    other = [name for name in ("base model", "adapter") if start.identity.get(name) != wanted[name]]
    if other:
        raise UserError(
            f"train.start: {path} was trained with another {' and another '.join(other)}; use a checkpoint with the"
            " model and adapter sections of this config, or set train.start: null"
        )
    return start.best_adapter()


def factors(
    context: WorkerContext,
    spec: TrainSpec,
    loss: SupervisedLoss,
    known: dict[str, AdapterWeights] | None,
) -> dict[str, Factors]:
    """Return the factors of every target, from the known adapter, from the search's shared folder, or new ones."""
    adapter = spec.config.adapter
    targets = find_targets(loss.model, adapter.targets, adapter.rank)
    if known:  # in another version of this package, "all-linear" may have meant other layers
        order = {name: index for index, name in enumerate(targets)}
        return {
            name: known[name].factors
            for name in sorted(known, key=lambda name: order.get(name, len(order)))
        }
    if spec.shared:
        began = time.perf_counter()
        shared = spec.stored_factors().read(targets)
        # All workers compute the factors if one of them cannot read them. It would wait for the others otherwise.
        if all(collectives.gather(bool(shared))) and shared:
            logger.info(
                f"{adapter.method} factors read from the search's folder in {time.perf_counter() - began:.2f} s"
            )
            return at_scale(shared, adapter)
    if method_named(adapter.method).needs != "weight":
        # The method runs the base before it has adapters. A sharded base is run by all workers together.
        cluster = spec.config.cluster
        place_model(loss, cluster.strategy, context.device, cluster.fsdp_replicas)
        check_base(loss, spec, context.device)
    new, report, of_data = new_factors(loss, targets, spec.config, spec.train, context.device)
    reached("initialise", rank=context.rank)
    logger.info(describe(adapter.method, report))
    if of_data:
        logger.info(of_data.line(adapter.method))
    return at_scale(new, adapter)


def resume(trainer: Trainer, source: Checkpoint) -> Tensor | None:
    """Load a checkpoint's tensors into the trainer; return the flat vector of its best evaluation, if there was one."""
    flat = trainer.flat
    flat.load(flat.vector, named(source.adapter))
    trainer.optimizer.load(source.optimizer, source.state.step)
    if source.state.best_step is None:
        return None
    best = flat.vector.clone()
    if source.best is not None:
        flat.load(best, source.best)
    return best


def named(adapter: dict[str, AdapterWeights]) -> dict[str, Tensor]:
    parts = {f"{name}.da": weights.da for name, weights in adapter.items()}
    return parts | {f"{name}.db": weights.db for name, weights in adapter.items()}


def describe(method: str, report: InitReport) -> str:
    shares = ", ".join(
        f"worker {worker}: {plural(layers, 'layer')} in {seconds:.2f} s"
        for worker, (layers, seconds) in enumerate(zip(report.layers, report.seconds, strict=True))
    )
    line = f"{method} initialisation: {shares}; exchange {report.exchange_seconds:.2f} s; digest {report.digest[:12]}"
    if report.deficient:
        names = some(report.deficient, 4)
        line += f"; rank-deficient layers, where a part of the factors is arbitrary: {names}"
    return line


# The self-test of a worker's model. The base is tested before factors are derived from what it computes, the adapters
# before the first step. A test takes as long as some steps, so its result is kept, in the checkpoint and on the node.
# It is used again with the same model, settings, device, processor and versions.


def first_sequences(store: TokenStore) -> Sequence[Pack]:
    return [store[number] for number in range(min(8, store.wait(8)))]


def self_test(
    loss: SupervisedLoss, spec: TrainSpec, packs: Sequence[Pack], device: torch.device
) -> SelfTest:
    """Test the base without its adapters, and give it the attention that has passed. Raises UserError if none has.

    All workers of a sharded base must call it together.
    """
    if loss.tested is None:
        with _as_user_error(loss):
            loss.tested = choose_attention(loss, packs, spec.config, device)
        logger.info(loss.tested.line())
    else:
        require_layout(loss, spec.config)
    return loss.tested


@contextlib.contextmanager
def _as_user_error(loss: SupervisedLoss) -> Iterator[None]:
    """Raise an error of the model's code as a UserError, because it would happen again after each restart."""
    try:
        yield
    except (UserError, collectives.PeerLost):
        raise
    except Exception as error:
        # A failed exchange of a sharded base has the same types, and may pass.
        device = next(loss.parameters()).device
        if loss.sharded or is_of_gpu(error) or lacks_memory(error, device):
            raise
        family = type(loss.model).__name__
        frames = traceback.extract_tb(error.__traceback__)
        of_model = [frame for frame in frames if "/torch/" not in frame.filename]
        frame = (of_model or frames)[-1]
        logger.debug(f"{family} cannot be trained", exc_info=True)
        raise UserError(
            f"model.name: {family} cannot be trained here: {type(error).__name__}: {first_line(error)}"
            f" ({Path(frame.filename).name}, line {frame.lineno}); name another model"
        ) from error


def check_base(loss: SupervisedLoss, spec: TrainSpec, device: torch.device) -> None:
    # All workers must call it together: the test may have passed on the GPUs of others.
    collectives.together(lambda: self_test(loss, spec, first_sequences(spec.train), device))


def self_tested(context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> StartingPoint:
    """Return the starting point with the attention that has passed. All workers must call it together.

    A base that several adapters share is tested once. Raises UserError, with what to set instead, if the model or its
    training computes wrong numbers.
    """
    used = what_computes(context, spec, next(start.trainer.loss.model.parameters()).dtype)
    kept = None
    # Elsewhere the model's digest does not cover all of its code.
    if spec.base.digest and not spec.config.model.trust_remote_code:
        parts = [json.dumps(part, sort_keys=True) for part in (used, spec.identity())]
        kept = node_cache.result_path("self-tests", *parts)
    known = passed(start, used)
    text = node_cache.read(kept) if known is None and kept is not None else None
    if text is not None:
        known = records.parsed(text, SelfTest)
    # A sharded base needs all workers for a test, so all of them test if one has no result.
    if all(collectives.gather(known is not None)):
        assert known is not None
        start.state.self_test = {"with": used, "found": known.to_json()}
        start = replace(start, attention=_take_over(context, spec, start, known))
        return _without(context, spec, start, known.without)
    logger.info("self-test: comparing the training step with the model's own attention")
    # The test may pass here and fail on the GPUs of other workers.
    found = collectives.together(lambda: _test(context, spec, start))
    before = start.state.self_test
    if start.resumed and before is not None:
        # The reference with which the run began was measured in its layout.
        found = replace(found, once=found.once and before["found"].get("once", False))
    start.state.self_test = {"with": used, "found": found.to_json()}
    if kept is not None:
        node_cache.keep(kept, json.dumps(found.to_json()))
    return _without(context, spec, replace(start, attention=found.layout), found.without)


def _test(context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> SelfTest:
    loss = start.trainer.loss
    adapted = start.trainer.adapted
    packs = first_sequences(spec.train)
    start.trainer.set_training(False)
    with context.activate(adapted):
        attention = self_test(loss, spec, packs, context.device).attention
        with _as_user_error(loss):
            missed, off = check_adapters(
                loss,
                adapted,
                packs,
                attention,
                context.device,
                new=not start.trained,
                named=not isinstance(spec.config.adapter.targets, str),
            )
    assert loss.tested is not None
    loss.tested = replace(loss.tested, gradients=off)
    return replace(loss.tested, without=tuple(missed))


# The first step of a new adapter: how far it moves each layer decides the automatic rate.


def measure_first_step(context: WorkerContext, spec: TrainSpec, start: StartingPoint) -> None:
    """Note the automatic learning rate of a new adapter.

    All workers must call it together. Raises UserError if train.lr=auto has nothing to be measured on.
    """
    train = spec.config.train
    trainer = start.trainer
    state = start.state
    before = state.lr_steps
    steps = planned_steps(train, spec.train)
    state.lr_steps = steps
    if start.resumed:
        old = state.lr
        if old and before and before != steps:
            state.lr = trainer.rate_for(steps, old, before)
            if is_auto(train.lr):
                logger.info(
                    f"train.lr=auto: the peak rate is {state.lr:.2g} for {steps} steps; it was {old:.2g} for {before}"
                )
        return
    trainer.set_training(False)
    with context.activate(trainer.adapted):
        packs = first_sequences(spec.train)
        auto = trainer.automatic_rate(packs, steps, start.attention)
    state.lr = auto
    if is_auto(train.lr):
        if auto is None:
            raise UserError(
                "train.lr=auto: stacked experts cannot be measured, and only these are adapted; set a number"
            )
        line = f"train.lr=auto: the peak rate is {auto:.2g}"
        if train.lr_factor != 1:
            line += f" x train.lr_factor {train.lr_factor:g}"
        logger.info(line)
    elif auto is not None:
        times_auto = train.lr * train.lr_factor / auto
        # Tuned rates lay within a factor of 1.4 of the automatic one (docs/generated/learning_rate.md).
        if times_auto > 4:
            logger.warning(
                f"train.lr={train.lr:g} is {times_auto:.2g} times the rate that fits this method, rank and alpha"
                f" ({auto:.2g}), and the training may diverge; set train.lr=auto, unless you have tuned it"
            )


def _without(
    context: WorkerContext, spec: TrainSpec, start: StartingPoint, layers: Sequence[str]
) -> StartingPoint:
    # A trained adapter keeps all of its layers.
    before = start.trainer
    layers = [name for name in layers if name in before.adapted and not start.trained]
    if not layers:
        return start
    logger.info(
        f"adapter.targets: all-linear leaves out {plural(len(layers), 'layer')}: no gradient reaches them with"
        f" data.max_length={spec.config.data.max_length} (for example {layers[0]})"
    )
    kept = {name: layer for name, layer in before.adapted.items() if name not in layers}
    with context.activate(kept):
        remove(before.loss.model)
        install(before.loss.model, kept)
    trainer = Trainer(before.loss, kept, spec.config, context.device, sizes=before.sizes)
    return replace(start, trainer=trainer)


def what_computes(context: WorkerContext, spec: TrainSpec, dtype: torch.dtype) -> dict[str, str]:
    """Return what decides, beside a run's identity, the numbers that a worker computes with a base of this `dtype`."""
    model = spec.config.model.model_dump(mode="json", exclude={"name"})
    return platform_of(context.device) | {
        "code": node_cache.code(),
        "model": json.dumps(model, sort_keys=True),
        "precision": str(dtype),  # model.dtype may be `auto`, which depends on the other workers
        "strategy": spec.config.cluster.strategy,
        "recompute": str(spec.config.train.activation_checkpointing),
        "micro-batch": str(spec.config.train.micro_batch),
    }


def passed(start: StartingPoint, used: dict[str, str]) -> SelfTest | None:
    """Return the test result in the checkpoint, if it was obtained with exactly this; else None."""
    stored: Any = start.state.self_test
    if not start.resumed or not isinstance(stored, dict) or stored.get("with") != used:
        return None
    return records.parsed(json.dumps(stored.get("found")), SelfTest)


def _take_over(
    context: WorkerContext, spec: TrainSpec, start: StartingPoint, known: SelfTest
) -> str:
    """Give the base the attention that has passed, unless another adapter already has. Return the attention's name."""
    loss: Any = start.trainer.loss
    start.trainer.set_training(False)
    if loss.tested is None:
        with context.activate(start.trainer.adapted):
            loss.model.set_attn_implementation(known.attention)
        loss.given_masks = known.given_masks
        loss.tested = known
        logger.info(f"self-test: passed earlier with attention={known.attention}")
    else:
        require_layout(loss, spec.config)
    return str(loss.tested.layout)
