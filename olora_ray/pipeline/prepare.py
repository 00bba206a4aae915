"""The preparation of a run: its plan, its tokens, and the specification for its workers."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from olora_ray.cluster import preflight
from olora_ray.cluster.decide import (
    LENGTH,
    DataDecisions,
    DataFacts,
    Decided,
    Lengths,
    decide,
    decide_data,
)
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import plural
from olora_ray.config.decided import NOTHING, DataConfig, DecidedConfig, Kept
from olora_ray.config.load import override
from olora_ray.config.schema import NO_GATE, OF_PAIRS, Config
from olora_ray.config.section import Source, is_auto
from olora_ray.data import detect
from olora_ray.data.formats import format_named
from olora_ray.model.load import skeleton
from olora_ray.model.packing import most_tokens
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import answers, export_preflight
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.progress import batch_split
from olora_ray.tokens.plan import Plan, Split
from olora_ray.tokens.prepare import StoreBuild, begin, look_here, look_there, plan_here
from olora_ray.tokens.prepare import prepare as prepare_store
from olora_ray.tokens.preview import describe
from olora_ray.tokens.store import TokenStore
from olora_ray.train import checkpoint
from olora_ray.train.estimate import MemoryEstimate
from olora_ray.train.loader import total_steps
from olora_ray.train.objectives.objective import objective_named
from olora_ray.train.scoring import Judge

logger = logging.getLogger(__name__)
GUARD = Path(__file__).with_name("other_texts.jsonl")
"""Every tenth text of gate.guard=text."""

# The plan of a run: adapted layers, layers that are left out, and memory.


def check_settings(config: Config) -> None:
    """Raise UserError for an objective or scorer that cannot be used; warn of settings without effect."""
    _check_formats(config)
    name = config.train.objective
    metrics = [config.gate.metric, *(condition.metric for condition in config.gate.conditions)]
    if "eval/perplexity" in metrics and not is_auto(name) and not objective_named(name).perplexity:
        raise UserError(
            f"gate: metric eval/perplexity is not measured with train.objective={name}; use eval/loss"
        )
    scorer = config.evaluation.scorer
    if scorer:
        Judge(scorer)
    if config.data.holds_out():
        return
    useless = {"evaluation.scorer": scorer, "train.early_stop": config.train.early_stop}
    for field, value in useless.items():
        if value:
            logger.warning(
                f"{field}: has no effect, because no rows are held out; set data.eval or data.eval_fraction"
            )


def plan(decided: Decided, base: BaseModel, prefix: str = "") -> None:
    """Log the layers of the run; raise UserError for layers that could not be exported.

    `prefix` comes before each line of the plan.
    """
    config = decided.config
    size = decided.size
    problems = export_preflight.problems(base, config, size.targets)
    if len(problems) > 2:
        more = plural(len(problems) - 2, "more type")
        problems = [*problems[:2], f"{more} of layers cannot be exported"]
    if problems:
        raise UserError("; ".join(problems))
    logger.info(prefix + _model_line(config, size))
    # The reasons that are not by design may surprise the user.
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in size.selection.left_out.items():
        if not reason.by_design:
            names_by_reason.setdefault(reason.kind, []).append(name)
    for kind, names in names_by_reason.items():
        logger.info(
            f"{prefix}adapter.targets: all-linear leaves out {len(names)} layers: {kind} (for example {names[0]})"
        )


def _check_formats(config: Config) -> None:
    """Raise UserError if the objective cannot learn from a format; `auto` is checked when it is decided."""
    name = config.train.objective
    if is_auto(name):
        return
    objective = objective_named(name)
    sources = {"data.train": config.data.train, "data.eval": config.data.eval}
    for field, listed in sources.items():
        for number, source in enumerate(listed):
            if is_auto(source.format):
                continue
            makes = format_named(source.format).makes
            if makes not in objective.takes:
                raise UserError(
                    f"{field}.{number}.format: train.objective={name} cannot learn from {source.format}; use rows that"
                    f" make {' or '.join(sorted(objective.takes))}"
                )


def _model_line(config: Config, size: MemoryEstimate) -> str:
    share = size.trainable / size.parameters
    covered = sum(map(math.prod, size.targets.values())) / size.parameters
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


def length(config: DecidedConfig, packs: int, about: bool = False) -> str:
    """Return the number of steps and the size of a step in words; `about`: `packs` is an estimate."""
    steps = f"{total_steps(config.train, packs)} steps"
    if about:
        steps = f"about {steps}"
    return f"{steps}; {batch_split(config, config.cluster.most)}"


def say_steps(spec: TrainSpec) -> None:
    if spec.train.complete:
        manifest = spec.train.manifest
        logger.info(
            f"training: {length(spec.config, len(spec.train))}; an epoch has {len(spec.train):,} sequences,"
            f" {manifest.tokens:,} tokens, {manifest.supervised:,} of them supervised"
        )
        return
    train = spec.config.train
    if train.steps:
        steps = f"{train.steps} steps"
    else:
        noun = "epoch" if train.epochs == 1 else "epochs"
        steps = f"{train.epochs:g} {noun}"
    split = batch_split(spec.config, spec.config.cluster.most)
    logger.info(
        f"training: {steps}; {split}; tokens are prepared in {spec.train.shard_count:,} shards"
    )


# The decisions of a run, and its tokens.


def read_data(
    config: Config,
    base: Base,
    kept: Kept = NOTHING,
    found: Mapping[str, Source] | None = None,
) -> DataDecisions:
    """Decide what the tokens depend on; needs no Ray. `found` is the result of `detect.check_data`, if it is known.

    Raises UserError for unusable data. For `data.max_length: auto` the rows of a sample are read.
    """
    if found is None:
        found = detect.find_formats(config)
    facts = DataFacts(found)
    if is_auto(config.data.max_length) and kept.decision(LENGTH) is None:
        most = most_tokens(skeleton(base.model, config.model))
        changes = {LENGTH: most, "data.max_rejected": 1.0}
        wide = decide_data(override(config, changes), base.spec, facts, kept)
        facts = replace(facts, lengths=_lengths(wide.config, base, most))
    data = decide_data(config, base.spec, facts, kept)
    _check_formats(data.config)
    return data


def _lengths(config: DataConfig, base: Base, most: int) -> Lengths:
    splits: list[Split] = ["train"]
    if config.data.holds_out():
        splits.append("eval")
    looks = [describe(config, base.spec, split, tell=False) for split in splits]
    return Lengths(
        longest=max(look.longest for look in looks),
        rows=sum(
            each.rows
            for look in looks
            for each in look.sources
            if not each.source.has_no_questions()
        ),
        exact=all(look.exact for look in looks),
        over=sum(look.too_long for look in looks),
        most=most,
    )


def tell(decided: Decided, assumed: str = "") -> None:
    """Log what was decided and why, and the memory of a worker; `assumed` follows the decisions about the cluster."""
    for name, decision in decided.decisions.items():
        if name == LENGTH:
            logger.info(f"{name}: auto is {decision.value:,}: {decision.why}")
        elif decision.value == "tokens":
            continue  # train.objective without pairs: nobody asks
        elif name.startswith(("cluster.", "train.")) or decision.value in OF_PAIRS:
            value = str(decision.value).lower()
            logger.info(f"{name}: auto is {value}: {decision.why}{assumed}")
    size = decided.size
    packed = decided.config.model.quantization
    base = "base" if packed == "none" else f"base as {packed}"
    parts = {base: size.base_bytes, "adapter and optimizer": size.adapter_bytes}
    if packed != "none":
        parts["one unpacked layer"] = size.gathered_bytes
    elif size.gathered_bytes:
        parts["gathered"] = size.gathered_bytes
    if size.answer_bytes > size.activation_bytes:
        parts["answers to held-out prompts"] = size.answer_bytes
    else:
        parts["activations"] = size.activation_bytes
    shown = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    without = f"; without {size.problem}" if size.problem else ""
    logger.info(
        f"memory per worker, estimated: {size.total_bytes() / 2**30:.2f} GiB ({shown}),"
        f" plus about 1 GiB for the process{without}"
    )
    time = decided.step_time()
    if time is not None:
        logger.info(f"time, estimated: {time.line(decided.expected.card)}")
    if size.problem:
        logger.info(
            f"memory: the estimate is without {size.problem}: the model's code does not run without weights;"
            " if memory runs out, set train.activation_checkpointing=true or lower train.micro_batch"
        )


def decided(
    config: Config,
    data: DataDecisions,
    base: BaseModel,
    cluster: ClusterFacts,
    kept: Kept = NOTHING,
    trial: bool = False,
) -> Decided:
    """Decide about the training on this cluster, and log it. Raises UserError if it cannot run there. Needs Ray."""
    made = decide(config, data, base, cluster, kept, trial)
    tell(made)
    resumed = bool(kept.settings)
    preflight.require(made.config, cluster, base, made.size, made.expected, resumed)
    return made


Check = Callable[[Mapping[str, str]], None]
"""Receives digests of contents by their names in `TrainSpec.identity`; raises UserError if they are not the
expected."""


@dataclass(frozen=True)
class Prepared:
    spec: TrainSpec
    build: StoreBuild
    """The preparation of the token store for training."""
    scores: frozenset[str]
    """Names of the scores of the answers."""


def prepare_tokens(
    config: DecidedConfig,
    base: Base,
    planned: int,
    auto: Iterable[str] = (),
    *,
    wait: bool = False,
    guard: bool = False,
    check: Check = lambda contents: None,
) -> Prepared:
    """Prepare the token stores of a training.

    The store of held-out rows is complete on return. The training store is an `Arrival`, which may be written during
    the training: keep the returned build entered as long as tokens are needed; the next run prepares the shards that
    are then missing. With `wait` both stores are complete. With `guard`, held-out rows have a third store beside them,
    of the texts in GUARD. `planned` are the bytes that the plan expects, `auto` the decided fields. `check` gets the
    digests before any row is tokenised.
    Raises UserError for unusable data.
    """
    start = _digest_of_start(config)
    with user_errors():
        look = look_there(config)
        build = begin(config, base.spec, "train", look)
        other = None
        digests = {"training data": build.store.digest, "held-out data": ""}
        if config.data.holds_out():
            other = begin(config, base.spec, "eval", look)
            digests["held-out data"] = other.store.digest
        check(digests)
        if start:
            check({"start": start})
        held_out = None
        if other:
            other.run()
            build.check_against(other)
            held_out = TokenStore.open(other.store.uri)
        if wait:
            build.run()
        texts = None
        if guard and held_out and "text" in objective_named(config.train.objective).takes:
            texts = prepare_store(_of_guard(config), base.spec, "eval", tell=False)
        scores = answers.check_answers(config, held_out, base.tokenizer)
        # This process prepares a small store in a moment. A larger one is prepared by Ray tasks, beside the training.
        if not wait and (build.complete or build.small):
            build.run()
        elif not wait:
            logger.info("tokens: train: being prepared; training starts with the first shards")
            build.start(config.cluster.most * config.cluster.cpus_per_worker)
    store = TokenStore.open(build.store.uri) if wait else build.store
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
        planned=planned,
        auto=tuple(auto),
        guard=texts,
        eval_sources=_names_of_sources(other.plan) if other else (),
    )
    return Prepared(spec, build, scores)


def _of_guard(config: DecidedConfig) -> DecidedConfig:
    """Return the config whose held-out rows are the guard's texts."""
    changes = {
        **NO_GATE,
        "data.eval": [{"path": str(GUARD), "format": "text"}],
        "data.eval_fraction": None,
        "data.max_rejected": 1.0,
        "evaluation.scorer": None,
    }
    return override(config, changes)


def _names_of_sources(plan: Plan) -> tuple[str, ...]:
    """Return a name for metrics of the source of each file; () if there is one source."""
    if len(plan.sources) == 1:
        return ()
    names = [
        re.sub(r"[^\w.-]", "_", source.path.rstrip("/").rpartition("/")[2])
        for source in plan.sources
    ]
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names)]
    return tuple(names[file.source] for file in plan.files)


def contents(config: DataConfig, base: Base) -> dict[str, str]:
    """Return the digests that `prepare_tokens` passes to `check`, and the model's; needs no Ray.

    Raises UserError for unusable data.
    """
    start = _digest_of_start(config)
    look = look_here(config)
    digests = {
        "base model": base.model.digest,
        "tokenizer": base.spec.digest,
        "training data": plan_here(config, base.spec, "train", look).digest(),
        "held-out data": "",
    }
    if config.data.holds_out():
        digests["held-out data"] = plan_here(config, base.spec, "eval", look).digest()
    if start:
        digests["start"] = start
    return digests


def _digest_of_start(config: Config) -> str | None:
    # The manifest contains the digests of all files of the checkpoint.
    if config.train.start is None:
        return None
    with as_user_error(
        f"train.start: {config.train.start} is no checkpoint", OSError, reason=short_reason
    ):
        content = storage.read_bytes(storage.join(config.train.start, checkpoint.MANIFEST))
    return storage.digest_bytes(content)[:32]
