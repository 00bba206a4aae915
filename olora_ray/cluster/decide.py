"""The decisions of a run: each value that was asked for as `auto`, with its reason.

`decide_data` needs no cluster: the dry run, an evaluation and a retraining's look at the data call it without Ray.
`decide` needs the facts of the cluster. Both are pure functions but for the folder of the base model, which they read.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from olora_ray.cluster.preflight import (
    AMPERE,
    GIB,
    ClusterFacts,
    Node,
    fits,
    gpus_per_worker,
    unknown,
)
from olora_ray.common.errors import UserError
from olora_ray.config.decided import (
    NOTHING,
    DataConfig,
    DecidedConfig,
    DecidedEvaluation,
    Decision,
    Decisions,
    Expected,
    Kept,
    Recompute,
    values_of,
    with_values,
)
from olora_ray.config.schema import OF_PAIRS, AnyConfig, Config, Train
from olora_ray.config.section import Source, is_auto
from olora_ray.data.formats import format_named
from olora_ray.data.formats.format import FEEDBACK, MAY_BE_CHATS
from olora_ray.data.sources import say_once
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.model.load import pick_dtype
from olora_ray.model.source import BaseModel
from olora_ray.train import price
from olora_ray.train.estimate import MemoryEstimate, estimate
from olora_ray.train.price import StepTime

logger = logging.getLogger(__name__)

MICRO = "train.micro_batch"
RECOMPUTE = "train.activation_checkpointing"
UNKNOWN = "the memory of a GPU is not known"
RUNGS: tuple[Recompute, ...] = ("swiglu", True)
"""Recomputation that `auto` tries, the cheapest first."""
WORKERS = "cluster.workers"
GPUS = "cluster.gpus_per_worker"
LENGTH = "data.max_length"
PACKING = "data.packing"
OBJECTIVE = "train.objective"
METRIC = "gate.metric"
ENOUGH = 2**15
"""Tokens of a micro-batch above which no GPU is faster, so that `auto` has no more."""
ON_CPUS = 4
"""Sequences of a micro-batch without GPUs."""
AMPLE = 1.1
"""A step may take more than estimated."""


# The data: formats, chats, length and packing.


@dataclass(frozen=True)
class Lengths:
    """The lengths of rows in tokens, of those that a dry run reads."""

    longest: int
    """0 if all rows are plain text."""
    rows: int
    exact: bool
    """True if all rows were read."""
    over: int
    """Rows with more than `most` tokens."""
    most: int
    """The largest number of tokens that the model takes."""


@dataclass(frozen=True)
class DataFacts:
    found: Mapping[str, Source] = field(default_factory=dict)
    """Setting of a source, such as data.train.0 -> the source with the format and fields that its rows have."""
    lengths: Lengths | None = None
    """None if `data.max_length` is a number."""


@dataclass(frozen=True)
class DataDecisions:
    config: DataConfig
    decisions: Decisions


def decide_data(
    config: Config, spec: TokenizerSpec, facts: DataFacts, kept: Kept = NOTHING
) -> DataDecisions:
    """Decide what the tokens depend on. Raises UserError if `data.max_length: auto` has no rows to be measured on."""
    decisions = _of_sources(config, spec, facts.found, kept)
    if is_auto(config.data.max_length):
        decisions[LENGTH] = kept.decision(LENGTH) or _length(config, facts.lengths)
    if is_auto(config.data.packing):
        decisions[PACKING] = kept.decision(PACKING) or _packing(spec.apart)
    decided = with_values(config, Config, values_of(decisions))
    if is_auto(config.train.objective):
        decisions[OBJECTIVE] = kept.decision(OBJECTIVE) or objective_decision(decided)
    pairs = _setting_of_pairs(_held_out(decided), ("pair",))
    if is_auto(config.gate.metric):
        decisions[METRIC] = _metric(pairs)
    _require_measured(config, pairs)
    made = with_values(config, DataConfig, values_of(decisions))
    _require_fit_for_pairs(made, spec.apart)
    return DataDecisions(made, decisions)


def _require_fit_for_pairs(config: DataConfig, apart: str | None) -> None:
    """Raise UserError for pairs that cannot be trained so; name settings of pairs that are not used."""
    pairs = _setting_of_pairs(_sources(config))
    train = config.train
    if pairs is None:
        for name, value in {"beta": train.beta, "chosen": train.chosen}.items():
            if value != Train.model_fields[name].default:
                # No error: a night may have new rows and no new pairs.
                say_once(
                    f"train.{name}: not used, because data.train has no preference pairs",
                    logging.WARNING,
                )
    elif config.adapter.dropout:
        raise UserError(
            "adapter.dropout: with preference pairs it must be 0, because noise in one of two answers is a margin"
        )
    elif apart:
        raise UserError(
            f"{pairs}: two answers need one sequence, and the model {apart}; train on rows with one answer"
        )


def _sources(config: AnyConfig) -> dict[str, Source]:
    found = {}
    for number, source in enumerate(config.data.train):
        found[f"data.train.{number}"] = source
    for number, source in enumerate(config.data.eval):
        found[f"data.eval.{number}"] = source
    return found


def _of_sources(
    config: Config, spec: TokenizerSpec, found: Mapping[str, Source], kept: Kept
) -> dict[str, Decision]:
    """Decide the formats of the sources, and which prompts with completions become chats."""
    decisions: dict[str, Decision] = {}
    for setting, source in _sources(config).items():
        format_name = source.format
        if is_auto(format_name):
            decision = kept.decision(f"{setting}.format")
            fields = kept.fields(setting, source.fields)
            if decision is None:
                # A trial may have formats that are recognised only when its files are listed.
                if setting not in found:
                    continue
                why = "the first rows have this format"
                decision = Decision(found[setting].format, why)
                fields = Decision(found[setting].fields, why, asked=source.fields)
            format_name = decision.value
            decisions[f"{setting}.format"] = decision
            decisions[f"{setting}.fields"] = fields
        # The rows of other formats have one form alone, and most of them refuse a choice.
        if is_auto(source.chat) and format_named(format_name).makes in MAY_BE_CHATS:
            why = "the model has a chat template"
            if not spec.has_template:
                why = "the model has no chat template"
            name = f"{setting}.chat"
            decisions[name] = kept.decision(name) or Decision(spec.has_template, why)
    return decisions


def _length(config: Config, lengths: Lengths | None) -> Decision:
    assert lengths is not None
    if not lengths.longest:
        raise UserError(
            "data.max_length: auto is not possible for plain text, which is cut into pieces; set a number"
        )
    number = min(max(256, -(-lengths.longest // 64) * 64), lengths.most)
    read = f"{lengths.rows:,} rows"
    if not lengths.exact:
        read += " of a sample"
    why = f"the longest of {read} has {lengths.longest:,} tokens"
    if lengths.over:
        why = (
            f"enough for all of {read} but {lengths.over:,} with more than the model's {lengths.most:,} tokens, which"
            f" follow data.too_long: {config.data.too_long}"
        )
    return Decision(number, why)


def length_of(config: AnyConfig) -> int:
    """Return data.max_length; raise UserError if it is auto, where no training has decided it."""
    length = config.data.max_length
    if is_auto(length):
        raise UserError(
            "data.max_length: auto works only in finetune, sweep and retrain; set the number from their log"
        )
    return length


def objective_decision(config: AnyConfig) -> Decision:
    """Return what `train.objective: auto` becomes with the formats of the sources."""
    pairs = _setting_of_pairs(_sources(config))
    if pairs is None:
        return Decision("tokens", "no rows are preference pairs")
    return Decision("pairs", f"rows of {pairs} are preference pairs")


def _setting_of_pairs(
    sources: Mapping[str, Source], makes: Collection[str] = FEEDBACK
) -> str | None:
    """Return the first source whose rows are pairs or ratings."""
    for setting, source in sources.items():
        if not is_auto(source.format) and format_named(source.format).makes in makes:
            return setting
    return None


def _held_out(config: AnyConfig) -> dict[str, Source]:
    """Return the sources from which rows are held out."""
    held_out = "data.eval."
    if config.data.eval_fraction is not None:
        held_out = "data.train."
    found = {}
    for setting, source in _sources(config).items():
        if setting.startswith(held_out):
            found[setting] = source
    return found


def _metric(pairs: str | None) -> Decision:
    if pairs is None:
        return Decision("eval/loss", "no held-out rows are preference pairs")
    return Decision(OF_PAIRS[0], f"held-out rows of {pairs} are preference pairs")


def _require_measured(config: Config, pairs: str | None) -> None:
    """Raise UserError if the gate needs a metric of held-out pairs, and there are none."""
    for metric in (config.gate.metric, *(condition.metric for condition in config.gate.conditions)):
        if metric in OF_PAIRS and pairs is None:
            raise UserError(f"gate: metric {metric} is not measured: no held-out pairs")


def _packing(apart: str | None) -> Decision:
    if apart is None:
        return Decision(True, "no part of the model mixes neighbouring examples")
    return Decision(False, f"the model {apart}, which would mix neighbouring examples")


# The cluster: workers, micro-batch and recomputation.


@dataclass(frozen=True)
class Decided:
    """A run before its first group of workers."""

    config: DecidedConfig
    decisions: Decisions
    expected: Expected
    size: MemoryEstimate
    """The memory that a worker needs with this config."""

    def step_time(self) -> StepTime | None:
        """Return the planned time of a step; None on CPUs, for an unknown GPU, and if a part cannot be counted."""
        card = price.card_of(self.expected.card)
        plain = self.expected.dtype == "bfloat16" and self.config.model.quantization == "none"
        if card is None or not plain or not self.size.work:
            return None
        return price.step_time(self.size.work, card, self.config.accumulation())


def decide(
    config: Config,
    data: DataDecisions,
    base: BaseModel,
    cluster: ClusterFacts,
    kept: Kept = NOTHING,
    trial: bool = False,
) -> Decided:
    """Decide what the training on this cluster depends on; `trial`: it is one of many in a search."""
    decisions = dict(data.decisions) | _workers(config, cluster, trial)
    micro = config.train.micro_batch
    recompute = config.train.activation_checkpointing
    values = values_of(decisions)
    values[MICRO] = 1 if is_auto(micro) else micro
    values[RECOMPUTE] = False if is_auto(recompute) else recompute
    draft = with_values(data.config, DecidedConfig, values)
    nodes = cluster.with_room(draft.cluster.fewest)
    expected = expect(draft, nodes, kept)
    if is_auto(micro):
        choices = (False, *RUNGS) if is_auto(recompute) else (recompute,)
        now = kept.decision(MICRO) or _micro_batch(draft, base, expected, nodes, choices)
        decisions[MICRO] = now
        draft = draft.with_step(now.value, draft.train.activation_checkpointing)
    size = estimate(draft, base, expected)
    if is_auto(recompute):
        decisions[RECOMPUTE], size = recomputation(draft, base, expected, nodes, size)
        draft = draft.with_step(draft.train.micro_batch, decisions[RECOMPUTE].value)
    return Decided(draft, decisions, expected, size)


def decide_evaluation(
    config: AnyConfig, cluster: ClusterFacts, spec: TokenizerSpec | None = None
) -> DecidedConfig | DecidedEvaluation:
    """Decide what a measurement depends on; without held-out rows no `spec` is needed.

    Raises UserError if data.max_length is auto.
    """
    decisions = _workers(config, cluster, trial=False)
    decisions[LENGTH] = Decision(length_of(config), "")
    if is_auto(config.data.packing):
        decisions[PACKING] = _packing(None if spec is None else spec.apart)
    if is_auto(config.train.objective):
        decisions[OBJECTIVE] = objective_decision(config)
    values: dict[str, Any] = values_of(decisions) | {RECOMPUTE: False}
    if is_auto(config.train.micro_batch):
        values[MICRO] = ON_CPUS
    if isinstance(config, Config):
        return with_values(config, DecidedConfig, values)
    return with_values(config, DecidedEvaluation, values)


def _workers(config: AnyConfig, cluster: ClusterFacts, trial: bool) -> dict[str, Decision]:
    decisions = {}
    gpus = gpus_per_worker(config.cluster, cluster.has_gpus)
    if is_auto(config.cluster.gpus_per_worker):
        why = "the cluster has GPUs" if gpus else "the cluster has no GPUs"
        decisions[GPUS] = Decision(gpus, why)
    if is_auto(config.cluster.workers):
        if not gpus:
            decisions[WORKERS] = Decision(2, "without GPUs there are two")
        elif trial:
            decisions[WORKERS] = Decision(1, "one for each trial")
        else:
            now = cluster.workers_now
            most = cluster.workers_at_most
            why = "one for each GPU"
            if now < most:
                why += f"; {now} have room now"
            # fsdp_replicas divides one number of workers, not a range.
            several = now < most and config.cluster.fsdp_replicas == 1
            decisions[WORKERS] = Decision((now, most) if several else most, why)
    return decisions


def expect(config: DecidedConfig, nodes: Sequence[Node], kept: Kept = NOTHING) -> Expected:
    """Return what the plan assumes of these nodes: float32 and sdpa if a GPU is older than Ampere.

    A resumed run keeps its precision (cluster/worker_context.py). Otherwise GPUs are assumed to compute in bfloat16
    and to have flash attention (model/load.py, model/attention.py).
    """
    gpu = config.cluster.gpus_per_worker > 0
    old = gpu and any((node.info.gpu_generation or AMPERE) < AMPERE for node in nodes)
    attention = config.model.attention
    if is_auto(attention) and (old or (gpu and kept.dtype == "float32")):
        attention = "sdpa"
    dtype = str(pick_dtype(config.model, torch.device("cpu"))).removeprefix("torch.")
    if is_auto(config.model.dtype) and kept.dtype is not None:
        dtype = kept.dtype
    elif is_auto(config.model.dtype) and gpu:
        dtype = "float32" if old else "bfloat16"
    cards = {name for node in nodes for name in node.info.gpu_names}
    card = ""
    if gpu and len(cards) == 1:
        (card,) = cards
    return Expected(gpu, dtype, attention, card)


def _micro_batch(
    config: DecidedConfig,
    base: BaseModel,
    expected: Expected,
    nodes: Sequence[Node],
    recompute: Sequence[Recompute],
) -> Decision:
    """Return the largest equal part of a step, in sequences, that fits in the memory of a GPU."""
    share = -(-config.train.global_batch // config.cluster.most)
    if not expected.gpu:
        return Decision(ON_CPUS, "without GPUs there are four")
    if not nodes:
        return Decision(min(share, ON_CPUS), "no node with a GPU has told its memory")
    if unknown(nodes):
        return Decision(1, UNKNOWN)
    parts = sorted({-(-share // number) for number in range(1, share + 1)}, reverse=True)
    why = "no larger part of a step fits on each GPU"
    for again in recompute:
        one = estimate(config.with_step(1, again), base, expected)
        for micro in parts:
            ample = replace(one, activation_bytes=int(AMPLE * micro * one.activation_bytes))
            needed = f"{ample.total_bytes() / GIB:.1f} GiB on each GPU"
            if again:
                needed += ", recomputed"
            if micro * config.data.max_length > ENOUGH:
                continue
            if not fits(config, base, ample, expected, nodes):
                why = f"{micro} would need about {needed}"
                continue
            return Decision(micro, f"a step takes at most about {needed}")
    return Decision(1, why)


def recomputation(
    config: DecidedConfig,
    base: BaseModel,
    expected: Expected,
    nodes: Sequence[Node],
    size: MemoryEstimate,
) -> tuple[Decision, MemoryEstimate]:
    """Decide `train.activation_checkpointing: auto`; return the decision and the size of the training with it."""
    if not nodes:
        return Decision(False, "no node has told its memory"), size
    if expected.gpu and unknown(nodes):
        least = config.with_step(config.train.micro_batch, True)
        return Decision(True, UNKNOWN), estimate(least, base, expected)
    ample = replace(size, activation_bytes=int(AMPLE * size.activation_bytes))
    if fits(config, base, ample, expected, nodes):
        return Decision(False, "a step fits in memory"), size
    decision = Decision(False, "it would not save memory")
    found = size
    for again in RUNGS:
        less = estimate(config.with_step(config.train.micro_batch, again), base, expected)
        if size.activation_bytes <= less.activation_bytes:
            continue
        why = (
            f"a step takes {less.activation_bytes / GIB:.2f} GiB; without it,"
            f" {size.activation_bytes / GIB:.2f} GiB would not fit"
        )
        decision = Decision(again, why)
        found = less
        ample = replace(less, activation_bytes=int(AMPLE * less.activation_bytes))
        if fits(config, base, ample, expected, nodes):
            break
    return decision, found


def with_room_for(
    decided: Decided, largest: int, base: BaseModel, cluster: ClusterFacts
) -> Decided:
    """Recompute in all trials of a search if one with the micro-batch `largest` would not fit in memory without it.

    One choice for all trials, because recomputing changes no result. In a trial that has memory enough it only costs
    time.
    """
    config = decided.config
    undecided = RECOMPUTE in decided.decisions and not config.train.activation_checkpointing
    if not undecided or largest <= config.train.micro_batch:
        return decided
    wide = config.with_step(largest, False)
    size = estimate(wide, base, decided.expected)
    nodes = cluster.with_room(config.cluster.fewest)
    decision, _ = recomputation(wide, base, decided.expected, nodes, size)
    if not decision.value:
        return decided
    logger.info(
        f"train.activation_checkpointing=auto: {str(decision.value).lower()} for all trials, because a trial with"
        f" {MICRO}={largest} would not fit in memory without it"
    )
    return replace(decided, config=config.with_step(config.train.micro_batch, decision.value))
