"""A comparison of arms: the learning rate is tuned for each; then all are trained with new seeds and compared.

Both phases are searches with fixed trials, and no finished trial runs again. A trial is found by what it is (arm, rate,
seed), so an interrupted comparison resumes, and a finished one can get more seeds and more arms.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import ray

from comparison import phase, row_losses, tuning
from comparison.arguments import LEVEL, Arm, Comparison, Trial
from comparison.folder import FINAL, TUNING, shared_by_adapter
from comparison.phase import Ended, FixedTrials, PhaseSpec
from comparison.row_losses import RowLosses
from comparison.rows import RowSets
from comparison.tuning import Tuned
from olora_ray.cluster.decide import DataDecisions, Decided, decide
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import statistics, storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import duration, plural
from olora_ray.config.load import flatten, leaves
from olora_ray.config.schema import NO_GATE
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.prepare import check_settings, plan, prepare_tokens
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep import run as search
from olora_ray.sweep import search_folder, shared_work
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import start
from olora_ray.tracking.run import Tracker
from olora_ray.train import estimate
from olora_ray.train.estimate import MemoryEstimate
from olora_ray.train.loader import total_steps

logger = logging.getLogger("olora_ray.comparison")

QUIET = {**NO_GATE, "evaluation.scorer": None, "evaluation.samples": 0}
"""Settings of trainings whose answers are not needed."""
EVALUATIONS = 4
"""Evaluations of a final training: after 25, 50, 75 and 100% of its steps."""
START_SECONDS = 15.0
"""Time of a training before its first step: processes, model, self-test."""
TYPICAL = 0.02
"""Standard deviation of the paired differences of seeds, in nats, that is assumed before any is measured."""
INIT = "init_seconds.txt"


@dataclass(frozen=True)
class TuningResult:
    trials: Sequence[Ended]
    base: float
    tuned: Mapping[str, Tuned]
    """Name of an arm -> its tuned rate, for arms with a trial of the grid that did not break off."""
    rows: int
    """Number of tuning rows that were measured."""


@dataclass(frozen=True)
class Final:
    ended: Ended
    losses: RowLosses | None
    """On the test rows; None if it broke off."""


@contextlib.contextmanager
def tracked(comparison: Comparison, base: Base) -> Iterator[Tracker]:
    """Yield the comparison's own MLflow run, the parent of all trainings' runs."""
    config = comparison.config
    tags = {"olora.kind": "comparison", "olora.base_digest": base.model.digest}
    # MLflow refuses another value of a parameter, and a comparison may get more arms and seeds.
    params = flatten(config) | dict(leaves(comparison.compare.model_dump(mode="json"), "compare"))
    with start.mlflow_run(
        config, tags, RunFolder(config.folder()), params, after_error="KILLED"
    ) as tracker:
        tracker.tags({"olora.arms": ",".join(arm.name for arm in comparison.arms)})
        yield tracker


def sizes(comparison: Comparison, data: DataDecisions, base: Base) -> dict[str, MemoryEstimate]:
    """Return arm -> size of a training; raises UserError if the model or the rank does not allow an arm."""
    here = ClusterFacts.here(comparison.config.cluster)
    decided = decide(comparison.config, data, base.model, here, trial=True)
    of_arms = {}
    for arm in comparison.arms:
        config = arm.config(decided.config)
        size = estimate.estimate(config, base.model, decided.expected)
        check_settings(config)
        plan(replace(decided, config=config, size=size), base.model)
        of_arms[arm.name] = size
    return of_arms


def machine() -> str:
    resources = ray.cluster_resources()
    gpus = f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
    return f"{resources.get('CPU', 0):g} CPUs{gpus}"


def visible(spread: float, seeds: int, level: float) -> float:
    """Return half of the interval's width if the paired differences of seeds have this standard deviation."""
    return statistics.quantile(seeds - 1, level) * spread / math.sqrt(seeds)


def seeds_needed(spread: float, half: float, level: float) -> int | None:
    """Return the smallest number of seeds whose interval is at most +-`half`; None if 10,000 are too few."""
    return next(
        (seeds for seeds in range(2, 10_001) if visible(spread, seeds, level) <= half), None
    )


def seeds_line(varies: str, spread: float, seeds: int, comparisons: int, relevant: float) -> str:
    """Say which difference `seeds` can show, and how many compare.relevant needs; `varies` introduces the spread."""
    level = statistics.simultaneous(LEVEL, comparisons)
    half = visible(spread, seeds, level)
    needed = seeds_needed(spread, relevant, level)
    return (
        f"{varies} {spread:.2g} nats from seed to seed: {seeds} seeds measure it to within ±{half:.2g} nats, and"
        f" ±{relevant:g} (compare.relevant) needs {needed or 'more than 10,000'} seeds"
    )


class Run:
    def __init__(
        self,
        comparison: Comparison,
        decided: Decided,
        base: Base,
        rows: RowSets,
        sizes: Mapping[str, MemoryEstimate],
        parent: str,
    ) -> None:
        """`sizes` is by arm, `parent` the id of the comparison's MLflow run; needs ray.init."""
        # Workers have olora_ray, but pipelines/ is missing there or in another folder. So tasks carry this code.
        ray.cloudpickle.register_pickle_by_value(sys.modules["comparison"])
        self.comparison, self.base, self.rows, self.sizes, self.parent = (
            comparison,
            base,
            rows,
            sizes,
            parent,
        )
        self.config, self.folder = decided.config, decided.config.folder()
        self.planned = decided.size.total_bytes()

    def seconds(self) -> float:
        return sum(
            search_folder.progress(storage.join(self.folder, name)).seconds
            for name in (TUNING, FINAL)
        )

    def tune(self) -> TuningResult:
        """Train every arm at every rate of the grid with one seed."""
        seeds, others = len(self.comparison.seeds), len(self.comparison.arms) - 1
        varies = "if the difference of two arms varies by"
        logger.info(seeds_line(varies, TYPICAL, seeds, others, self.comparison.compare.relevant))
        changes = {**QUIET, "run.seed": self.config.run.seed}
        spec, trials = self._tokens("tuning", changes), self.comparison.tuning()
        self._share(spec)
        self._estimate(spec, trials)
        # Only the loss after the last step counts, so none is measured before: that would take half the time or more.
        return self._tuned(
            self._phase(TUNING, trials, {spec.config.run.seed: spec}, evaluations=1), spec
        )

    def train(self, result: TuningResult) -> list[Final]:
        """Train every arm at its tuned rate with every seed, and measure it on the test rows."""
        # Without the baseline, or with it alone, there is nothing to compare.
        if self.comparison.baseline.name not in result.tuned or len(result.tuned) < 2:
            return []
        tuned = [
            (arm, result.tuned[arm.name].factor)
            for arm in self.comparison.arms
            if arm.name in result.tuned
        ]
        trials = [
            self.comparison.trial(arm, factor, seed)
            for seed in self.comparison.seeds
            for arm, factor in tuned
        ]
        specs = {
            seed: replace(self._tokens("test", {"run.seed": seed}), each_example=True)
            for seed in self.comparison.seeds
        }
        tested = next(iter(specs.values())).eval
        self._check_groups(tested)
        logger.info(
            f"final trainings: {', '.join(result.tuned)} with {plural(len(specs), 'fresh seed')} each"
        )
        ended = self._phase(FINAL, trials, specs, EVALUATIONS)
        return self._measured(ended, tested)

    def _measured(self, ended: Sequence[Ended], tested: TokenStore | None) -> list[Final]:
        assert tested is not None
        places = row_losses.places_of(tested)
        packs = [tested[number] for number in range(len(tested))]
        tokens = [each.supervised for pack in packs for each in pack.examples()]
        results = {
            each.trial.name(): row_losses.result_of(
                each.record.folder, each.spec.config, len(places)
            )
            for each in ended
            if math.isfinite(each.loss)
        }
        if len(precisions := {str(result.precision) for result in results.values()}) > 1:
            logger.warning(
                f"the trainings computed in {' and '.join(sorted(precisions))}, because model.dtype is auto:"
                " differences between arms may be differences between nodes; set model.dtype, or use equal nodes"
            )
        losses = {
            name: RowLosses(
                places, tuple(tokens), result.losses, result.trainable, result.forgotten
            )
            for name, result in results.items()
        }
        return [Final(each, losses.get(each.trial.name())) for each in ended]

    def init_seconds(self, arm: Arm) -> float:
        """Return the time of an arm's initialisation in one process."""
        place = shared_by_adapter(self.folder, arm.config(self.config))
        return float(storage.read_text(storage.join(place, INIT)))

    def _check_groups(self, tested: TokenStore | None) -> None:
        # Rows that are too long have no tokens. If one group is left, the result would hold for this group alone.
        places = row_losses.places_of(tested)
        if len(set(row_losses.group_numbers(places, self.rows.groups))) < 2:
            raise UserError(
                f"compare.test_rows: only {len(set(places))} of the {self.rows.counts['test']} test rows fit in"
                " data.max_length, and all are of one group; set data.max_length or compare.test_rows higher, and"
                " choose another run.name"
            )

    def _tokens(
        self, held_out: Literal["tuning", "test"], changes: Mapping[str, object]
    ) -> TrainSpec:
        config = self.rows.config(self.config, held_out, changes)
        guard = held_out == "test" and config.evaluation.guard
        return prepare_tokens(config, self.base, self.planned, wait=True, guard=guard).spec

    def _share(self, spec: TrainSpec) -> None:
        # All trials of the tuning use the same loss of the base model, and those of an arm the same factors.
        baseline = ""
        for arm in self.comparison.arms:
            config = arm.config(spec.config)
            folder = shared_by_adapter(self.folder, config)
            if not storage.exists(storage.join(folder, INIT)):
                # Factors of an interrupted attempt would be reused, and the noted time would be too short.
                storage.remove(folder)
                if baseline:
                    storage.write_text(storage.join(folder, "baseline.json"), baseline)
                what = f"{arm.name}: factors for the tuning"
                factors = [(config.adapter.method, config.adapter.rank)]
                seconds = shared_work.made(
                    replace(spec, config=config, shared=folder), folder, factors, what
                ).init
                storage.write_text(storage.join(folder, INIT), f"{seconds}\n")
                logger.info(f"{what}: {seconds:.2f} s")
            # The file is missing for a sharded base model, whose loss the trials measure.
            if storage.exists(file := storage.join(folder, "baseline.json")):
                baseline = baseline or storage.read_text(file)

    def _phase(
        self, name: str, trials: Sequence[Trial], specs: Mapping[int, TrainSpec], evaluations: int
    ) -> list[Ended]:
        spec = PhaseSpec(
            name=f"{self.config.run.name}-{name}",
            folder=storage.join(self.folder, name),
            train_spec=next(iter(specs.values())),
            space=FixedTrials.of(trials),
            parent=self.parent,
            spared=0.0,
            root=self.folder,
            specs=specs,
            evaluations=evaluations,
        )
        return phase.ended(spec, trials)

    def _estimate(self, spec: TrainSpec, trials: Sequence[Trial]) -> None:
        pace = _pace(self.comparison, spec, self.sizes[self.comparison.baseline.name])
        side_by_side = max(
            1, search.room(worker_resources(self.config)) // self.config.cluster.fewest
        )
        # As the rates are not known yet, each folder stands for a final training of an earlier attempt.
        done = len(storage.names(storage.join(self.folder, FINAL, "trials")))
        final = max(0, len(self.comparison.arms) * len(self.comparison.seeds) - done)
        left = len(phase.missing(storage.join(self.folder, TUNING), trials)), final
        logger.info(time_line(pace, *left, side_by_side))

    def _tuned(self, trials: Sequence[Ended], spec: TrainSpec) -> TuningResult:
        tuned, base = dict[str, Tuned](), phase.base_loss(trials)
        for arm in self.comparison.arms:
            losses = {each.trial.factor: each.loss for each in trials if each.trial.arm == arm}
            if (point := tuning.tuned(losses, base)) is None:
                logger.warning(f"{arm.name}: every trial broke off, so the arm is not compared")
                continue
            tuned[arm.name] = point
            edge = (
                ""
                if point.inside
                else "; it lies at the end of the grid, so a better one may lie beyond"
            )
            logger.info(
                f"{arm.name}: tuned to {point.factor:g} times its rate, lowest loss {point.loss:.4f} on the tuning"
                f" rows{edge}"
            )
        return TuningResult(trials, base, tuned, len(set(row_losses.places_of(spec.eval))))


def _pace(
    comparison: Comparison, spec: TrainSpec, size: MemoryEstimate
) -> tuple[float, float] | str:
    """Return the seconds of (a training, an evaluation), from one micro-batch of the baseline on this CPU.

    `spec` and `size` are the tuning's. Return the reason if the time would say nothing.
    """
    config = comparison.baseline.config(spec.config)
    elsewhere = os.environ.get("RAY_ADDRESS", "").strip() not in ("", "auto", "local")
    # The time on this machine's CPU says nothing about a GPU or about another machine of a cluster.
    if why := estimate.not_measured(config, size, elsewhere):
        return why
    assert spec.eval is not None
    train, workers = config.train, config.cluster.most
    width = min(train.micro_batch, train.global_batch)
    packs = [spec.train[number % len(spec.train)] for number in range(width)]
    steps = total_steps(train, len(spec.train))
    once, _ = estimate.micro_batch(config, spec.base, packs, steps)
    # An evaluation has no backward pass, which takes twice the time of the forward pass.
    evaluation = -(-len(spec.eval) // (width * workers)) * once / 3
    return START_SECONDS + steps * config.accumulation() * once, evaluation


def time_line(pace: tuple[float, float] | str, tuning: int, final: int, side_by_side: int) -> str:
    """Return the line for the log about the trainings that are left."""
    left = f"left to do: {plural(tuning + final, 'training')}, {side_by_side} at a time"
    if isinstance(pace, str):
        return f"{left}; their time is not estimated: {pace}"
    training, evaluation = pace
    rounds = math.ceil(tuning / side_by_side), math.ceil(final / side_by_side)
    seconds = rounds[0] * (training + evaluation) + rounds[1] * (
        training + EVALUATIONS * evaluation
    )
    return f"{left}: about {duration(seconds)}"
