"""The point at which a worker starts: the newest good checkpoint, the adapter of train.start, or new factors.

And the self-test of the model there.
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
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from olora_ray.adapter import initialise
from olora_ray.adapter.initialise import InitReport, at_scale
from olora_ray.adapter.inject import find_targets, install, remove, wrap
from olora_ray.adapter.layer import AdapterWeights, Factors, TakenWeight
from olora_ray.adapter.methods import FROM_WEIGHTS
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker_context import SharedBaseContext, WorkerContext, agreed, kind_of
from olora_ray.common import collectives, node_cache
from olora_ray.common.errors import StoreUnavailable, TryAgain, UserError, first_line
from olora_ray.common.fault_points import reached
from olora_ray.common.text import plural
from olora_ray.config.load import override
from olora_ray.model import attention
from olora_ray.tokens.plan import Pack
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import Checkpoint, TrainState
from olora_ray.train.data_driven import new_factors
from olora_ray.train.loader import Waiting, until
from olora_ray.train.loop import Trainer, train_mode
from olora_ray.train.loss import SelfTest, SupervisedLoss
from olora_ray.train.parallel import place_model
from olora_ray.train.self_test import SHORT, bare, check_adapters, choose_attention, examples_of, require_layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """A trainer whose adapter and optimizer are as they were after `state.step` steps."""

    trainer: Trainer
    attention: str
    """The base model's implementation, which decides how batches are laid out."""
    state: TrainState
    best: Tensor | None
    """The flat vector of the best evaluation so far."""
    resumed: bool
    """Whether it comes from a checkpoint of this run."""
    trained: bool = False
    """Whether the adapter was trained before, here or at train.start."""


def starting_point(
    context: WorkerContext, spec: TrainSpec, folder: str, waiting: Waiting | None = None
) -> StartingPoint:
    """Build what a worker trains; `folder` has the run's checkpoints, `waiting` is as of StepLoader.

    All workers must call it together. Raises UserError if a checkpoint, the adapter of train.start or the base
    model cannot be used.
    """
    found = restored(spec, folder)
    start = start_adapter(spec) if found is None else None
    state = found.state if found else TrainState()
    adapter, state.precision = spec.config.adapter, _precision(context, spec, state.precision)
    config = override(spec.config, {"model.dtype": state.precision})
    with context.activate({}):
        loss = context.base(replace(spec, config=config))
        model: Any = loss.model
        known = found.adapter if found else start
        adapted = wrap(model, factors(context, spec, loss, known, waiting), adapter.scale(), adapter.dropout)
        attention: str = model.config._attn_implementation
    with context.activate(adapted):
        cluster = spec.config.cluster
        place_model(loss, cluster.strategy, context.device, cluster.fsdp_replicas, cluster.fsdp_offload)
        trainer = Trainer(loss, adapted, spec.config, context.device)
    if found:
        return StartingPoint(trainer, attention, state, resume(trainer, found), resumed=True, trained=True)
    if start:
        trainer.flat.load(trainer.flat.vector, named(start))
    return StartingPoint(trainer, attention, state, None, resumed=False, trained=start is not None)


def _precision(context: WorkerContext, spec: TrainSpec, began: str | None) -> str:
    """The precision of the base, by torch's name: that of the base that trials share here, else as all agree on."""
    shared = context.dtype if isinstance(context, SharedBaseContext) else None
    if shared is None:
        return str(agreed(spec.config, context.device, began).model.dtype)
    if began not in (None, shared):
        logger.warning(
            f"model.dtype: auto: {shared}, of the base that trials share here, though this one began in {began}"
            " elsewhere: its numbers are a mixture; use nodes of one kind, or set it"
        )
    return shared


def restored(spec: TrainSpec, folder: str) -> Checkpoint | None:
    """The newest good checkpoint, the same on all workers; raises UserError if it is of another base, data or adapter.

    Worker 0 chooses: the others might see an older state of the storage. Raises StoreUnavailable, for another group of
    workers, if the storage does not answer.
    """
    rank = collectives.rank()
    try:
        newest = checkpoints.latest_good(folder) if rank == 0 else None
    except TryAgain as error:
        raise StoreUnavailable(str(error)) from None
    place = collectives.from_first(newest[0] if newest else None)
    if place is None:
        return None
    problem, found = None, newest[1] if newest else None
    try:
        found = found or checkpoints.read(place)
    except UserError as error:
        problem = _named(error, f"run.storage: worker {rank} cannot use what worker 0 can")
    try:
        collectives.raise_together(problem)
    except TryAgain as error:
        raise StoreUnavailable(str(error)) from None
    assert found is not None
    checkpoint.require_same(found.identity, spec.identity(), place)
    return found


def _named(error: UserError, what: str) -> UserError:
    """The same with what it is about: a TryAgain stays one."""
    return (TryAgain if isinstance(error, TryAgain) else UserError)(f"{what}: {error}")


def start_adapter(spec: TrainSpec) -> dict[str, AdapterWeights] | None:
    """The adapter of train.start; raises UserError if it is of another base or has other settings."""
    place = spec.config.train.start
    if place is None:
        return None
    problem, found = None, None
    try:
        found = checkpoints.read(place)
        wanted = spec.identity()
        if other := [what for what in ("base model", "adapter") if found.identity.get(what) != wanted[what]]:
            problem = UserError(f"train.start: {place} was trained with another {' and another '.join(other)}")
    except UserError as error:
        problem = _named(error, "train.start")
    collectives.raise_together(problem)
    assert found is not None
    return found.best_adapter()


def factors(
    context: WorkerContext,
    spec: TrainSpec,
    loss: SupervisedLoss,
    known: dict[str, AdapterWeights] | None,
    waiting: Waiting | None = None,
) -> dict[str, Factors]:
    """The factors of every target: those of a known adapter, those that a search shares, or new ones."""
    adapter = spec.config.adapter
    targets = find_targets(loss.model, adapter.targets, adapter.rank)
    if known:  # its layers may be others than "all-linear" means in this version
        places = {name: place for place, name in enumerate(targets)}
        return {name: known[name].factors for name in sorted(known, key=lambda name: places.get(name, len(places)))}
    if spec.shared:
        began = time.perf_counter()
        found = initialise.read(spec.factor_place(), spec.factor_origin(), adapter.rank, list(targets))
        # What one worker cannot read now is made by all together: it would wait for the others otherwise.
        if all(collectives.gather(bool(found))) and found:
            logger.info(
                f"{adapter.method} factors taken from those of the search in {time.perf_counter() - began:.2f} s"
            )
            return at_scale(found, adapter)
    if adapter.method not in FROM_WEIGHTS:
        # It is run before it has adapters, by all workers together where it is sharded.
        cluster = spec.config.cluster
        place_model(loss, cluster.strategy, context.device, cluster.fsdp_replicas, cluster.fsdp_offload)
        check_base(loss, spec, context.device, waiting)
    made, report, of_data = new_factors(loss, targets, spec.config, spec.train, context.device, waiting)
    reached("initialise", rank=context.rank)
    logger.info(describe(adapter.method, report))
    if of_data:
        logger.info(of_data.line(adapter.method))
    return at_scale(made, adapter)


def resume(trainer: Trainer, found: Checkpoint) -> Tensor | None:
    """Load a checkpoint's tensors into the trainer; returns the flat vector of its best evaluation, if it has one."""
    flat = trainer.flat
    flat.load(flat.vector, named(found.adapter))
    trainer.optimizer.load(found.optimizer, found.state.step)
    if found.state.best_step is None:
        return None
    best = flat.vector.clone()
    if found.best is not None:
        flat.load(best, found.best)
    return best


def named(adapter: dict[str, AdapterWeights]) -> dict[str, Tensor]:
    """The trained tensors of an adapter by the names that `FlatAdapters` gives them."""
    parts = {f"{name}.da": weights.da for name, weights in adapter.items()}
    return parts | {f"{name}.db": weights.db for name, weights in adapter.items()}


def describe(method: str, report: InitReport) -> str:
    """A line for the log about an initialisation."""
    shares = ", ".join(
        f"worker {worker}: {plural(layers, 'layer')} in {seconds:.2f} s"
        for worker, (layers, seconds) in enumerate(zip(report.layers, report.seconds, strict=True))
    )
    line = f"{method} initialisation: {shares}; exchange {report.exchange_seconds:.2f} s; digest {report.digest[:12]}"
    if report.deficient:
        names = ", ".join(report.deficient[:4]) + (" ..." if len(report.deficient) > 4 else "")
        line += f"; rank-deficient, a part of their factors is arbitrary: {names}"
    return line


# The self-test of a worker's model: of the base before anything is made of what it computes, of its adapters before the
# first step. It takes as long as some steps. What was found with the same model and settings, on such a device and
# processor and by the same versions, is not tested again: it stands in the checkpoint from which a worker resumes, and
# is kept on the node for the next run.


def first_sequences(spec: TrainSpec, waiting: Waiting | None = None) -> Sequence[Pack]:
    """Return the first sequences of the training, the same on every worker; `waiting` as of StepLoader."""
    store, wanted = spec.train, 8
    until(store, lambda: store.available >= wanted or store.total is not None, waiting)
    return [store[number] for number in range(min(wanted, store.available))]


def tested(loss: SupervisedLoss, spec: TrainSpec, packs: Sequence[Pack], device: torch.device) -> SelfTest:
    """Test the base, and give it the attention that has passed; raises UserError.

    Its adapters, if it has some, take no part. All workers of a sharded base must call it together.
    """
    if loss.tested is None:
        with bare(loss.model), _told(loss):
            try:
                loss.tested = choose_attention(loss, packs, spec.config, device)
            except UserError:  # its advice is for causal models
                if hasattr(loss, "unshard") or not _sees_ahead(loss.model, packs, device):
                    raise
                raise UserError(
                    f"model.name: {type(loss.model).__name__} is no causal language model: what it makes of a token"
                    " depends on tokens after it; name another model"
                ) from None
        logger.info(loss.tested.line())
    else:
        require_layout(loss, spec.config)
    return loss.tested


@torch.no_grad()
def _sees_ahead(model: Any, packs: Sequence[Pack], device: torch.device) -> bool:
    """Return True if another last token changes what the model itself says before it, by more than rounding does."""
    model.set_attn_implementation(attention.own(model))
    ids = torch.tensor([next(examples_of(packs, SHORT))], device=device)
    other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    one, two = (model(input_ids=each, use_cache=False).logits[0, :-1].float().softmax(-1) for each in (ids, other))
    return float((one - two).abs().sum(-1).mean()) > 0.02


@contextlib.contextmanager
def _told(loss: SupervisedLoss) -> Iterator[None]:
    """Raise an error of the family's code as a UserError: each worker would meet it again, as often as it is started.

    What goes wrong in the exchanges of a sharded base looks the same, and may pass.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError, collectives.PeerLost):
        raise
    except Exception as error:
        if hasattr(loss, "unshard"):
            raise
        if isinstance(error, TakenWeight):
            raise UserError(f"adapter.targets: {first_line(error)}; leave it out of adapter.targets") from None
        family, frames = type(loss.model).__name__, traceback.extract_tb(error.__traceback__)
        place = next((each for each in reversed(frames) if "/torch/" not in each.filename), frames[-1])
        logger.debug(f"{family} cannot be trained", exc_info=True)
        raise UserError(
            f"model.name: {family} cannot be trained here: {type(error).__name__}: {first_line(error)}"
            f" ({Path(place.filename).name}, line {place.lineno}); name another model"
        ) from error


def check_base(loss: SupervisedLoss, spec: TrainSpec, device: torch.device, waiting: Waiting | None = None) -> None:
    """`tested` for a base that has no adapters yet; all workers must call it together, and all raise what one does."""
    problem = None
    try:
        tested(loss, spec, first_sequences(spec, waiting), device)
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)  # on other GPUs it may have gone well


def self_tested(
    context: WorkerContext, spec: TrainSpec, start: StartingPoint, waiting: Waiting | None = None
) -> StartingPoint:
    """Return the starting point with the attention that has passed; all workers must call it together.

    A base that several adapters share is tested once. `waiting` as of StepLoader. Raises UserError with what to set
    instead if the model, or this kind of training of it, is not right.
    """
    used = what_computes(context, spec, next(start.trainer.loss.model.parameters()).dtype)
    kept = _kept_at(spec, used)
    known = passed(start, used) or _kept(kept)
    if all(collectives.gather(known is not None)):  # a sharded base needs all of them for a test
        assert known is not None
        start.state.self_test = {"with": used, "found": known.to_json()}
        start = replace(start, attention=_take_over(context, spec, start, known))
        return _without(context, spec, start, known.without)
    logger.info("self-test: comparing what training computes with the model's own attention")
    problem, name = None, start.attention
    without: tuple[str, ...] = ()
    loss, adapted = start.trainer.loss, start.trainer.adapted
    try:
        packs = first_sequences(spec, waiting)
        train_mode(adapted, False)
        with context.activate(adapted):
            name = tested(loss, spec, packs, context.device).attention
            new, named = not start.trained, not isinstance(spec.config.adapter.targets, str)
            with _told(loss):
                missed, off = check_adapters(loss, adapted, packs, name, context.device, new=new, named=named)
            assert loss.tested is not None
            loss.tested, without = replace(loss.tested, gradients=off), tuple(missed)
    except UserError as error:
        problem = str(error)
    collectives.raise_together(problem)  # on other GPUs it may have gone well
    assert loss.tested is not None
    found = replace(loss.tested, without=without).to_json()
    start.state.self_test = {"with": used, "found": found}
    if kept is not None:
        node_cache.keep(kept, json.dumps(found))
    return _without(context, spec, replace(start, attention=name), without)


def _without(context: WorkerContext, spec: TrainSpec, start: StartingPoint, layers: Sequence[str]) -> StartingPoint:
    """Return the starting point without the adapters of these layers; those of a trained adapter stay."""
    before = start.trainer
    layers = [name for name in layers if name in before.adapted and not start.trained]
    if not layers:
        return start
    logger.info(
        f"adapter.targets: all-linear leaves out {plural(len(layers), 'layer')}: no gradient reaches them from text of"
        f" data.max_length={spec.config.data.length()} (for example {layers[0]})"
    )
    kept = {name: layer for name, layer in before.adapted.items() if name not in layers}
    with context.activate(kept):
        remove(before.loss.model)
        install(before.loss.model, kept)
    return replace(start, trainer=Trainer(before.loss, kept, spec.config, context.device))


def what_computes(context: WorkerContext, spec: TrainSpec, dtype: torch.dtype) -> dict[str, str]:
    """Return what decides, beside a run's identity, what a worker's model of this `dtype` makes of its data."""
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
    """Return what a checkpoint says was found with just this; None if that was something else, or never."""
    noted: Any = start.state.self_test
    if not start.resumed or not isinstance(noted, dict) or noted.get("with") != used:
        return None
    try:
        return TypeAdapter(SelfTest).validate_python(noted.get("found"))
    except ValidationError:
        return None


def _kept_at(spec: TrainSpec, used: dict[str, str]) -> str | None:
    """Return the file of this node that keeps what was found; None if the model's digest may not have all its code."""
    if not spec.base.digest or spec.config.model.trust_remote_code:
        return None
    return node_cache.place("self-tests", *(json.dumps(part, sort_keys=True) for part in (used, spec.identity())))


def _kept(file: str | None) -> SelfTest | None:
    """Return what an earlier run on this node has found."""
    text = node_cache.read(file) if file is not None else None
    try:
        return None if text is None else TypeAdapter(SelfTest).validate_json(text)
    except ValidationError:
        return None


def _take_over(context: WorkerContext, spec: TrainSpec, start: StartingPoint, known: SelfTest) -> str:
    """Give the base the attention that has passed, unless another adapter has done so; returns its name."""
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
