"""The preparation of a run: its plan, its tokens, and the specification for its workers."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from olora_ray.adapter.inject import Selection
from olora_ray.cluster import preflight
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import plural
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.data.formats import format_named
from olora_ray.model.load import skeleton
from olora_ray.model.packing import most_tokens
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import answers, export_preflight
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.progress import batch_split
from olora_ray.tokens.plan import Split, as_found
from olora_ray.tokens.prepare import StoreBuild, begin, look_here, look_there, plan_here
from olora_ray.tokens.preview import describe
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint, scoring
from olora_ray.train.estimate import MemoryEstimate, estimate
from olora_ray.train.loader import total_steps
from olora_ray.train.objectives.objective import objective_named

logger = logging.getLogger(__name__)

# The plan of a run: adapted layers, layers that are left out, and memory.


def plan(config: Config, base: BaseModel, prefix: str = "") -> MemoryEstimate:
    """Log and return the size of the run; raise UserError for impossible targets, rank or scorer.

    `prefix` comes before each line of the plan.
    """
    _check_objective(config)
    _check_scorer(config)
    if config.train.early_stop and not config.data.holds_out():
        logger.warning(
            "train.early_stop: has no effect, because no rows are held out; set data.eval or data.eval_fraction"
        )
    size = _deliverable(config, base)
    for line in (_model_line(config, size), *_left_out(size.selection), _memory_line(config, size)):
        logger.info(f"{prefix}{line}")
    return size


def _check_objective(config: Config) -> None:
    """Raise UserError if the objective cannot learn from a format, or has no perplexity for the gate."""
    name = config.train.objective
    objective = objective_named(name)
    sources = {"data.train": config.data.train, "data.eval": config.data.eval}
    for field, listed in sources.items():
        for number, source in enumerate(listed):
            if source.format == "auto":
                continue
            makes = format_named(source.format).makes
            if makes not in objective.takes:
                raise UserError(
                    f"{field}.{number}.format: train.objective={name} cannot learn from {source.format}; use rows that"
                    f" make {' or '.join(sorted(objective.takes))}"
                )
    metrics = [config.gate.metric, *(condition.metric for condition in config.gate.conditions)]
    if "eval/perplexity" in metrics and not objective.perplexity:
        raise UserError(
            f"gate: metric eval/perplexity is not measured with train.objective={name}; use eval/loss"
        )


def _check_scorer(config: Config) -> None:
    """Raise UserError for an unknown scorer; warn if there are no rows to score."""
    if not config.evaluation.scorer:
        return
    scoring.resolve(config.evaluation.scorer)
    if not config.data.holds_out():
        logger.warning(
            "evaluation.scorer: has no effect, because no rows are held out; set data.eval or data.eval_fraction"
        )


def _deliverable(config: Config, base: BaseModel) -> MemoryEstimate:
    """Return the size of a training; raise UserError if it could not be trained or exported."""
    size = estimate(config, base)
    if problems := export_preflight.problems(base, config, size.targets):
        more = [f"{plural(len(problems) - 2, 'more type')} of layers cannot be exported"] * (
            len(problems) > 2
        )
        raise UserError("; ".join([*problems[:2], *more]))
    return size


def _model_line(config: Config, size: MemoryEstimate) -> str:
    share, covered = (
        size.trainable / size.parameters,
        sum(map(math.prod, size.targets.values())) / size.parameters,
    )
    stacks = [
        target.experts for target in size.selection.targets.values() if target.experts is not None
    ]
    experts = f" and {len(stacks)} stacks of {max(stacks)} experts" if stacks else ""
    most = "up to " if config.adapter.largest_rank() > config.adapter.rank else ""
    return (
        f"model: {size.parameters / 1e6:,.1f} M parameters; {config.adapter.method} rank {config.adapter.rank} on"
        f" {len(size.targets) - len(stacks)} layers{experts}: {most}{size.trainable / 1e6:,.2f} M trainable"
        f" ({share:.2%}); covers {covered:.0%} of the parameters"
    )


def _left_out(selection: Selection) -> list[str]:
    # The reasons that are not by design may surprise the user.
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in selection.left_out.items():
        if not reason.by_design:
            names_by_reason.setdefault(reason.kind, []).append(name)
    return [
        f"adapter.targets: all-linear leaves out {len(names)} layers: {reason} (for example {names[0]})"
        for reason, names in names_by_reason.items()
    ]


def _memory_line(config: Config, size: MemoryEstimate) -> str:
    packed = config.model.quantization
    parts = {
        "base" if packed == "none" else f"base as {packed}": size.base_bytes,
        "adapter and optimizer": size.adapter_bytes,
    }
    if packed != "none" or size.gathered_bytes:
        parts["gathered" if packed == "none" else "one unpacked layer"] = size.gathered_bytes
    answering = size.answer_bytes > size.activation_bytes
    parts["answers to held-out prompts" if answering else "activations"] = max(
        size.answer_bytes, size.activation_bytes
    )
    shown = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    return (
        f"memory per worker, estimated: {size.total_bytes() / 2**30:.2f} GiB ({shown}),"
        f" plus about 1 GiB for the process{f'; without {size.problem}' if size.problem else ''}"
    )


def length(config: Config, packs: int, about: bool = False) -> str:
    """Return the number of steps and the size of a step in words; `about`: `packs` is an estimate."""
    steps = f"{'about ' if about else ''}{total_steps(config.train, packs)} steps"
    return f"{steps}; {batch_split(config, config.cluster.max_workers())}"


def say_steps(spec: TrainSpec) -> None:
    if spec.train.complete:
        manifest = spec.train.manifest
        logger.info(
            f"training: {length(spec.config, len(spec.train))}; an epoch has {len(spec.train):,} sequences,"
            f" {manifest.tokens:,} tokens, {manifest.supervised:,} of them supervised"
        )
    else:
        train = spec.config.train
        steps = (
            f"{train.steps} steps"
            if train.steps
            else f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
        )
        split = batch_split(spec.config, spec.config.cluster.max_workers())
        logger.info(
            f"training: {steps}; {split}; tokens are prepared in {spec.train.shard_count:,} shards"
        )


# The length of sequences, and the tokens of a run.


def with_length(config: Config, base: Base) -> Config:
    """Return the config with a number instead of `data.max_length: auto`, enough for the longest row of a sample.

    Raises UserError if all rows are plain text, which has no longest row because it is cut into pieces.
    """
    if config.data.max_length != "auto":
        return config
    most = most_tokens(skeleton(base.model, config.model))
    wide = override(config, {"data.max_length": most, "data.max_rejected": 1.0})
    splits: tuple[Split, ...] = ("train", "eval") if config.data.holds_out() else ("train",)
    looks = [describe(wide, base.spec, split, tell=False) for split in splits]
    longest, rows = max(look.longest for look in looks), sum(look.read for look in looks)
    if not longest:
        raise UserError(
            "data.max_length: auto is not possible for plain text, which is cut into pieces; set a number"
        )
    number = min(max(256, -(-longest // 64) * 64), most)
    read = f"{rows:,} rows{'' if all(look.exact for look in looks) else ' of a sample'}"
    said = f"the longest of {read} has {longest:,} tokens"
    if over := sum(look.too_long for look in looks):
        said = (
            f"enough for all of {read} but {over:,} with more than the model's {most:,} tokens, which follow"
            f" data.too_long: {config.data.too_long}"
        )
    logger.info(f"data.max_length: auto is {number:,}: {said}")
    return override(config, {"data.max_length": number})


Check = Callable[[Mapping[str, str]], None]
"""Receives digests of contents by their names in `TrainSpec.identity`; raises UserError if they are not the
expected."""


@dataclass(frozen=True)
class Prepared:
    spec: TrainSpec
    build: StoreBuild
    """The preparation of the token store for training, which may still grow."""
    scores: frozenset[str]
    """Names of the scores of the answers."""


def prepare_tokens(
    config: Config,
    base: Base,
    *,
    wait: bool = False,
    cpus_held: float = 0.0,
    check: Check = lambda contents: None,
) -> Prepared:
    """Prepare the token stores of a training.

    The store of held-out rows is complete on return. The training store may still grow during the training: keep the
    returned build entered as long as tokens are needed; the next run prepares the shards that are then missing. With
    `wait` both stores are complete. `cpus_held` is the number of CPUs that others hold; if they hold nearly all, this
    process prepares alone. `check` gets the digests before any row is tokenised. Raises UserError for unusable data.
    """
    start = _digest_of_start(config)
    with user_errors():
        look = look_there(config)
        build = begin(config, base.spec, "train", look)
        other = begin(config, base.spec, "eval", look) if config.data.holds_out() else None
        check(
            {
                "training data": build.store.digest,
                "held-out data": other.store.digest if other else "",
            }
        )
        check({"start": start} if start else {})
        # A search may vary whole sources, so their formats are not known before this point.
        config = as_found(config, build.plan, *([other.plan] if other else ()))
        if other:
            other.run()
            build.check_against(other)
        if wait:
            build.run(cpus_held)
        held_out = TokenStore.open(other.store.uri) if other else None
        scores = answers.check_answers(config, held_out, base.tokenizer)
        # This process prepares a small store in a moment. A larger one is prepared by Ray tasks, beside the training.
        if not wait and (build.complete or build.small):
            build.run()
        elif not wait:
            logger.info("tokens: train: being prepared; training starts with the first shards")
            build.start(config.cluster.max_workers() * config.cluster.cpus_per_worker)
    store = TokenStore.open(build.store.uri) if wait else build.store
    size = preflight.planned(config, base.model)
    template = base.spec.chat_template if base.spec.chosen else None
    spec = TrainSpec(
        config,
        base.model,
        base.spec.digest,
        base.eos,
        store,
        held_out,
        start,
        template=template,
        recompute=size.recompute,
        planned=size.total_bytes(),
    )
    return Prepared(spec, build, scores)


def contents(config: Config, base: Base) -> dict[str, str]:
    """Return the digests that `prepare_tokens` passes to `check`, and the model's; needs no Ray.

    Raises UserError for unusable data.
    """
    start, look = _digest_of_start(config), look_here(config)
    return {
        "base model": base.model.digest,
        "tokenizer": base.spec.digest,
        "training data": plan_here(config, base.spec, "train", look).digest(),
        "held-out data": plan_here(config, base.spec, "eval", look).digest()
        if config.data.holds_out()
        else "",
    } | ({"start": start} if start else {})


def _digest_of_start(config: Config) -> str | None:
    # The manifest contains the digests of all files of the checkpoint.
    if config.train.start is None:
        return None
    with as_user_error(
        f"train.start: {config.train.start} is no checkpoint", OSError, reason=short_reason
    ):
        content = storage.read_bytes(storage.join(config.train.start, checkpoint.MANIFEST))
    return storage.digest_bytes(content)[:32]
