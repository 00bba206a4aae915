"""Record of a comparison, the content of comparison.json: from the losses on each test row to differences."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from comparison.arguments import FACTOR, LEVEL, LR, Arm, Comparison, Trial
from comparison.folder import notes
from comparison.phase import base_loss
from comparison.run import Final, Run, TuningResult
from comparison.tuning import Tuned
from olora_ray.cluster.spec import TrainResult
from olora_ray.common import records, storage
from olora_ray.common.statistics import Interval, Values, crossed, per_token, simultaneous
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.config.section import is_auto
from olora_ray.pipeline import answers
from olora_ray.sweep.record import finite

SHARES = (0.25, 0.5, 1.0)
"""Shares of the steps after which the losses of a training are shown."""


@dataclass(frozen=True)
class Point:
    """A trial of the tuning; its loss is on the tuning rows, infinite if the training broke off."""

    arm: str
    factor: float
    """Multiple of the arm's rate."""
    lr: float | None
    """Peak learning rate; None if it is automatic and no training of the arm measured it."""
    loss: float


@dataclass(frozen=True)
class Training:
    """A training of an arm at its tuned learning rate, with a new seed."""

    seed: int
    loss: float
    """Loss on the test rows after the last step; infinite if the training broke off."""
    curve: tuple[tuple[int, float], ...]
    scores: Mapping[str, float]
    """Scores of the answers of its best adapter, if the config has a scorer."""
    folder: str = ""
    mlflow_run: str = ""

    def after(self, share: float) -> float:
        """Return the loss at the evaluation that is nearest to this share of the steps."""
        last = self.curve[-1][0]
        return min(self.curve[1:] or self.curve, key=lambda point: abs(point[0] - share * last))[1]


@dataclass(frozen=True)
class Against:
    """An arm's loss minus the baseline's, in nats per supervised token."""

    mean: float
    spread: float
    """Standard deviation of the differences of single seeds."""
    interval: Interval
    """95% interval, for this comparison alone."""
    adjusted: Interval
    """Wider interval: the adjusted intervals of all comparisons hold together with 95%."""


@dataclass(frozen=True)
class ArmRecord:
    name: str
    values: Mapping[str, Any]
    tuned: Tuned | None
    """None if every trial of the grid broke off."""
    lr: float | None
    trainings: tuple[Training, ...]
    loss: float | None
    """Mean over seeds and test rows, per supervised token; None if a training did not finish."""
    half: float | None
    against: Against | None
    """None for the baseline, and if one of the two has no loss."""
    init_seconds: float
    tunings: int
    tuning_seconds: float
    trainable: int | None
    """Number of trained parameters, counted in an adapter; None if no training finished."""
    forgotten: float | None = None
    """Mean rise of the loss on other texts over the seeds; None if it was not measured."""

    def broke_off(self) -> int:
        return sum(not math.isfinite(each.loss) for each in self.trainings)

    def course(self) -> tuple[float, ...]:
        """Return the loss after each of SHARES of the steps, as a mean over seeds; empty without a loss."""
        if self.loss is None:
            return ()
        return tuple(
            sum(each.after(share) for each in self.trainings) / len(self.trainings)
            for share in SHARES
        )


@dataclass(frozen=True)
class ComparisonRecord:
    name: str
    model: str
    task: str
    machine: str
    seconds: float
    tuning_seed: int
    seeds: tuple[int, ...]
    steps: int
    global_batch: int
    rows: Mapping[str, int]
    groups: int
    """Independent groups of test rows; without gate.group each row is one."""
    relevant: float
    level: float
    base_tuning: float
    base_test: float
    points: tuple[Point, ...]
    baseline: str
    arms: tuple[ArmRecord, ...]
    notes: tuple[str, ...] = ()

    def of(self, name: str) -> ArmRecord:
        return next(each for each in self.arms if each.name == name)

    def others(self) -> list[ArmRecord]:
        return [each for each in self.arms if each.name != self.baseline]

    def best(self) -> ArmRecord | None:
        """Return the arm with the lowest loss; None if no arm has one."""
        measured = [each for each in self.arms if each.loss is not None]
        return min(measured, key=lambda each: each.loss or 0.0, default=None)

    def to_json(self) -> str:
        # JSON has no infinity, so it becomes null.
        return json.dumps(finite(asdict(self)), indent=1, allow_nan=False, default=str) + "\n"


def recorded(
    run: Run, tuning: TuningResult, finals: Sequence[Final], machine: str
) -> ComparisonRecord:
    comparison, config = run.comparison, run.config
    against = _differences(comparison, finals, run.rows.groups)
    groups = run.rows.groups
    test, independent = (
        run.rows.counts["test"],
        len({number for each in groups.values() for number in each}),
    )
    # A test row that is too long has no loss, so it is left out of the counts.
    if (measured := next((each for each in finals if each.losses), None)) and measured.losses:
        test, independent = measured.losses.counts(groups)
    return ComparisonRecord(
        name=config.run.name,
        model=origin(run.base.model.name),
        task=", ".join(source.path.rstrip("/").rpartition("/")[2] for source in config.data.train),
        machine=machine,
        seconds=run.seconds(),
        tuning_seed=config.run.seed,
        seeds=comparison.seeds,
        steps=measured.ended.record.total if measured else 0,
        global_batch=config.train.global_batch,
        rows={**run.rows.counts, "tuning": tuning.rows, "test": test},
        groups=independent,
        relevant=comparison.compare.relevant,
        level=LEVEL,
        base_tuning=tuning.base,
        base_test=base_loss([each.ended for each in finals]),
        points=tuple(
            Point(each.trial.arm.name, each.trial.factor, _rate(tuning, each.trial), each.loss)
            for each in tuning.trials
        ),
        baseline=comparison.baseline.name,
        arms=tuple(
            _arm(run, tuning, arm, finals, against.get(arm.name)) for arm in comparison.arms
        ),
        notes=notes(config.folder()),
    )


def origin(name: str) -> str:
    """Return the base model's name; of a GGUF file, whose name tells its type, also that it is dequantised."""
    return f"{name.rpartition('/')[2]} (dequantised)" if name.endswith(".gguf") else name


def best_config(comparison: Comparison, record: ComparisonRecord) -> Config | None:
    """Return the user's config with the fields and the rate of the arm that has the lowest loss; None without one.

    Dropout and weight decay are those of the comparison.
    """
    if (best := record.best()) is None or best.tuned is None:
        return None
    own, arm = comparison.own, next(arm for arm in comparison.arms if arm.name == best.name)
    compared = override(
        comparison.config, comparison.trial(arm, best.tuned.factor, own.run.seed).values
    )
    parts = {name: compared.model_dump(mode="json")[name] for name in ("adapter", "train")}
    kept = {
        "train.early_stop": own.train.early_stop,
        "run.name": f"{comparison.config.run.name}-best",
    }
    return override(override(own, parts), kept)


def _differences(
    comparison: Comparison, finals: Sequence[Final], groups: Mapping[str, Sequence[int]]
) -> dict[str, Against]:
    """Return arm -> its difference to the baseline, for arms that have losses with every seed."""
    measured = {
        arm.name: pair
        for arm in comparison.arms
        if (pair := _losses(finals, arm, groups)) is not None
    }
    if comparison.baseline.name not in measured:
        return {}
    losses, tokens = measured.pop(comparison.baseline.name)
    # For all arms that were asked for: an arm that broke off was a comparison, too.
    together = simultaneous(LEVEL, len(comparison.arms) - 1)
    # Differences row by row and seed by seed: most of the spread between rows is common to both arms and cancels.
    return {
        name: _against(per_token(own - losses, tokens), together)
        for name, (own, _) in measured.items()
    }


def _against(values: Values, level: float) -> Against:
    difference, spread = crossed(values), float(values.mean(axis=1).std(ddof=1))
    return Against(difference.mean, spread, difference.interval(LEVEL), difference.interval(level))


def _losses(
    finals: Sequence[Final], arm: Arm, groups: Mapping[str, Sequence[int]]
) -> tuple[Values, Values] | None:
    """Return an arm's (losses (seeds, groups), tokens (groups,))."""
    rows = [each.losses for each in finals if each.ended.trial.arm == arm]
    # A mean over the seeds that did not break off would favour an arm that often does, so there is none.
    if not rows or None in rows:
        return None
    summed = [each.by_group(groups) for each in rows if each is not None]
    return np.stack([losses for losses, _ in summed]), summed[0][1]


def _arm(
    run: Run, tuning: TuningResult, arm: Arm, finals: Sequence[Final], against: Against | None
) -> ArmRecord:
    losses, tuned = _losses(finals, arm, run.rows.groups), tuning.tuned.get(arm.name)
    trained = [each for each in finals if each.ended.trial.arm == arm]
    mean = crossed(per_token(*losses)) if losses else None
    tried = [each for each in tuning.trials if each.trial.arm == arm]
    rated = run.comparison.trial(arm, tuned.factor, run.config.run.seed) if tuned else None
    return ArmRecord(
        name=arm.name,
        values=arm.values,
        tuned=tuned,
        lr=_rate(tuning, rated) if rated else None,
        trainings=tuple(_training(run, each) for each in trained),
        loss=mean.mean if mean else None,
        half=mean.half(LEVEL) if mean else None,
        against=against,
        init_seconds=run.init_seconds(arm),
        tunings=len(tried),
        tuning_seconds=sum(each.record.seconds for each in tried),
        trainable=next((each.losses.trainable for each in trained if each.losses), None),
        forgotten=_forgotten(trained),
    )


def _forgotten(trained: Sequence[Final]) -> float | None:
    known = [each.losses.forgotten for each in trained if each.losses]
    measured = [value for value in known if value is not None]
    return fmean(measured) if measured else None


def _rate(tuning: TuningResult, trial: Trial) -> float | None:
    """Return the peak learning rate of a trial; None if it is automatic and no training of the arm measured it."""
    rate, factor = trial.values[LR], float(trial.values[FACTOR])
    if not is_auto(rate):
        return float(rate) * factor
    results = (_result(each.record.folder) for each in tuning.trials if each.trial.arm == trial.arm)
    return next(
        (each.state.lr * factor for each in results if each and each.state and each.state.lr), None
    )


def _training(run: Run, final: Final) -> Training:
    record, loss, scores = final.ended.record, final.losses.mean() if final.losses else math.inf, {}
    if run.config.evaluation.scorer and (result := _result(record.folder)):
        scores = answers.scores_after(final.ended.spec.config, result, run.base.tokenizer)
    return Training(
        final.ended.trial.seed, loss, record.curve, scores, record.folder, record.mlflow_run
    )


def _result(folder: str) -> TrainResult | None:
    return records.read(
        storage.join(folder, "training.json"), TrainResult
    )  # None: the training broke off
