"""Preparation of a run: its plan, its tokens, and the specification that its workers get."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from olora_ray.adapter.candidates import GATE, HEAD, ROUTER
from olora_ray.adapter.inject import Coverage, Selection
from olora_ray.cluster import preflight
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError, short_reason
from olora_ray.common.storage import digest
from olora_ray.common.text import plural
from olora_ray.config.load import override
from olora_ray.config.schema import Config
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

logger = logging.getLogger(__name__)

# The plan of a run: what is adapted, what is left out, and memory.


def plan(config: Config, base: BaseModel) -> MemoryEstimate:
    """Say and return the size of the run; raises UserError for targets, rank or scorer that cannot be."""
    check_scorer(config)
    if config.train.early_stop and not config.data.holds_out():
        logger.warning(
            "train.early_stop: the training will not stop early, because no rows are held out; set data.eval or"
            " data.eval_fraction"
        )
    size = deliverable(config, base)
    say(config, size)
    return size


def check_scorer(config: Config) -> None:
    """Raise UserError for a scorer that there is not; warn of one that will have nothing to do."""
    if not config.evaluation.scorer:
        return
    scoring.resolve(config.evaluation.scorer)
    if not config.data.holds_out():
        logger.warning(
            "evaluation.scorer: no answer will be scored, because no rows are held out; set data.eval or"
            " data.eval_fraction"
        )


def deliverable(config: Config, base: BaseModel) -> MemoryEstimate:
    """The size of a training; raises UserError for what cannot be trained, or be exported afterwards."""
    size = estimate(config, base)
    if found := export_preflight.problems(base, config, size.targets):
        more = [f"{plural(len(found) - 2, 'other kind')} of layers cannot be exported either"] * (len(found) > 2)
        raise UserError("; ".join([*found[:2], *more]))
    return size


def say(config: Config, size: MemoryEstimate, where: str = "") -> None:
    """The lines of a plan: what is adapted, what is left out, memory. `where` comes before each."""
    for line in (_model_line(config, size), *_left_out(size.selection), _memory_line(config, size)):
        logger.info(f"{where}{line}")


def _model_line(config: Config, size: MemoryEstimate) -> str:
    share = size.trainable / size.parameters
    stacks = [target.experts for target in size.selection.targets.values() if target.experts is not None]
    experts = f" and {len(stacks)} stacks of {max(stacks)} experts" if stacks else ""
    most = "up to " if config.adapter.largest_rank() > config.adapter.rank else ""
    return (
        f"model: {size.parameters / 1e6:,.1f} M parameters; {config.adapter.method} rank {config.adapter.rank} on"
        f" {len(size.targets) - len(stacks)} layers{experts}: {most}{size.trainable / 1e6:,.2f} M trainable"
        f" ({share:.2%}); covers {_coverage(size.coverage)}"
    )


def _coverage(found: Coverage) -> str:
    """The share of the parameters behind an adapter; with the largest of the rest if that is more than a tenth."""
    total = found.adapted + sum(found.others.values())
    large = [kind for kind, count in found.others.items() if count > total / 100]
    rest = f" (left out: {', '.join(large)})" if found.share < 0.9 and large else ""
    return f"{found.share:.0%} of the parameters{rest}"


def _left_out(selection: Selection) -> list[str]:
    """A line for each kind of layer that "all-linear" cannot take, and for parts that are no language model."""
    kinds: dict[str, list[str]] = {}
    for name, reason in selection.left_out.items():
        if reason not in (HEAD, ROUTER, GATE):
            kinds.setdefault(reason.kind, []).append(name)
    return [
        f"adapter.targets: all-linear leaves out {len(names)} layers: {kind} (for example {names[0]})"
        for kind, names in kinds.items()
    ]


def _memory_line(config: Config, size: MemoryEstimate) -> str:
    packed = config.model.quantization
    parts = {
        "base" if packed == "none" else f"base as {packed}": size.base_bytes,
        "adapter and optimizer": size.adapter_bytes,
    }
    if packed != "none" or size.gathered_bytes:
        parts["gathered" if packed == "none" else "a layer unpacked"] = size.gathered_bytes
    answering = size.answer_bytes > size.activation_bytes
    parts["answers to held-out prompts" if answering else "activations"] = max(size.answer_bytes, size.activation_bytes)
    shown = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    return (
        f"memory per worker, estimated: {size.total_bytes() / 2**30:.2f} GiB ({shown}),"
        f" plus about 1 GiB for the process{f'; without {size.problem}' if size.problem else ''}"
    )


def length(config: Config, packs: int, about: bool = False) -> str:
    """The steps of a run, and what one is made of; `about`: the number of packs is an estimate."""
    steps = f"{'about ' if about else ''}{total_steps(config.train, packs)} steps"
    return f"{steps}; {batch_split(config, config.cluster.max_workers())}"


def say_steps(spec: TrainSpec) -> None:
    """The arithmetic of the training."""
    if spec.train.complete:
        manifest = spec.train.manifest
        logger.info(
            f"training: {length(spec.config, len(spec.train))}; an epoch has {len(spec.train):,} sequences,"
            f" {manifest.tokens:,} tokens, {manifest.supervised:,} of them supervised"
        )
    else:
        train = spec.config.train
        steps = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
        split = batch_split(spec.config, spec.config.cluster.max_workers())
        logger.info(f"training: {steps}; {split}; tokens come in {spec.train.shard_count:,} shards")


# The length of sequences, and the tokens of a run.


def with_length(config: Config, base: Base) -> Config:
    """The config with a number for `data.max_length: auto`: what the longest of the rows needs that are looked at.

    Raises UserError where that says nothing, since plain text is cut in pieces.
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
            "data.max_length: auto asks for rows that are not cut in pieces, as plain text is; set a number"
        )
    number = min(max(256, -(-longest // 64) * 64), most)
    logger.info(f"data.max_length: auto is {number:,}: the longest of {rows:,} rows has {longest:,} tokens")
    return override(config, {"data.max_length": number})


Check = Callable[[Mapping[str, str]], None]
"""Gets digests of contents by their names in `TrainSpec.identity`; raises UserError if they are not those it wants."""


@dataclass(frozen=True)
class Prepared:
    """The result of the preparation."""

    spec: TrainSpec
    build: StoreBuild
    """The token store for training, which may still grow."""
    scores: frozenset[str]
    """Names of the scores that the answers will have."""


def prepare_tokens(
    config: Config, base: Base, *, wait: bool = False, cpus_held: float = 0.0, check: Check = lambda contents: None
) -> Prepared:
    """Prepare a training's tokens.

    The store of held-out rows is complete on return. That for training may still grow, where the cluster has room
    for that beside the training: enter the build for as long as it is needed, what is not made on leaving is left
    to the next run. With `wait` both are complete. Where others hold `cpus_held` CPUs, about all, Ray is asked for
    none. `check` gets the contents once they are known, before a row is tokenised. Raises UserError for data that
    cannot be used.
    """
    start = _digest_of_start(config)
    with user_errors():
        look = look_there(config)
        build = begin(config, base.spec, "train", look)
        other = begin(config, base.spec, "eval", look) if config.data.holds_out() else None
        check({"training data": build.store.digest, "held-out data": other.store.digest if other else ""})
        check({"start": start} if start else {})
        # A search may vary whole sources, whose formats nobody has looked for yet.
        config = as_found(config, build.plan, *([other.plan] if other else ()))
        if other:
            other.run()
            build.hold_apart(other)
        if wait:
            build.run(cpus_held)
        held_out = TokenStore.open(other.store.uri) if other else None
        scores = answers.check(config, held_out, base.tokenizer)
        if not wait and (build.complete or build.small):
            build.run()
        elif not wait:
            logger.info("tokens: train: in the making; training starts with the first shards")
            build.start(config.cluster.max_workers() * config.cluster.cpus_per_worker)
    store = TokenStore.open(build.store.uri) if wait else build.store
    again = preflight.recomputes(config, base.model)
    template = base.spec.chat_template if base.spec.chosen else None
    spec = TrainSpec(
        config, base.model, base.spec.digest, base.eos, store, held_out, start, template=template, recompute=again
    )
    return Prepared(spec, build, scores)


def contents(config: Config, base: Base) -> dict[str, str]:
    """The digests that `prepare_tokens` gives to `check`, and those of the model; without Ray.

    Raises UserError for data that cannot be used.
    """
    start, look = _digest_of_start(config), look_here(config)
    return {
        "base model": base.model.digest,
        "tokenizer": base.spec.digest,
        "training data": plan_here(config, base.spec, "train", look).digest(),
        "held-out data": plan_here(config, base.spec, "eval", look).digest() if config.data.holds_out() else "",
    } | ({"start": start} if start else {})


def _digest_of_start(config: Config) -> str | None:
    """Return the digest of the manifest of the checkpoint at train.start, which has the digests of its files."""
    if config.train.start is None:
        return None
    try:
        return digest(storage.read_text(storage.join(config.train.start, checkpoint.MANIFEST)), length=32)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"train.start: {config.train.start} is no checkpoint: {short_reason(error)}") from None
