"""The analysis of a comparison: from the losses on each test row to differences with their intervals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from comparison.arguments import FACTOR, LEVEL, LR, Arm, Comparison, Trial
from comparison.folder import notes
from comparison.record import Against, ArmRecord, ComparisonRecord, Point, Training
from comparison.row_losses import RowLosses
from comparison.run import Final, Run, TuningResult
from comparison.statistics import Values, crossed, per_token, simultaneous
from olora_ray.cluster.spec import TrainResult
from olora_ray.common import storage
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.pipeline import answers


def record(run: Run, tuning: TuningResult, finals: Sequence[Final], machine: str) -> ComparisonRecord:
    comparison, config = run.comparison, run.config
    against = _differences(comparison, finals, run.rows.groups)
    measured = next((each for each in finals if each.losses), None)
    counts, groups = _counts(run, tuning, measured.losses if measured else None)
    points = tuple(
        Point(trial.arm.name, trial.factor, _rate(tuning, trial), each.loss) for trial, each in tuning.trials
    )
    return ComparisonRecord(
        name=config.run.name,
        model=origin(run.base.model.name),
        task=", ".join(source.path.rstrip("/").rpartition("/")[2] for source in config.data.train),
        machine=machine,
        seconds=run.seconds(),
        tuning_seed=config.run.seed,
        seeds=comparison.seeds,
        own_lr=f"{config.train.lr}" + (f" x {config.train.lr_factor:g}" if config.train.lr_factor != 1 else ""),
        steps=measured.ended.record.total if measured else 0,
        global_batch=config.train.global_batch,
        rows=counts,
        groups=groups,
        relevant=comparison.compare.relevant,
        level=LEVEL,
        base_tuning=tuning.base,
        base_test=next((loss for each in finals if (loss := each.ended.base()) is not None), math.inf),
        points=points,
        baseline=comparison.baseline.name,
        arms=tuple(_arm(run, tuning, points, arm, finals, against.get(arm.name)) for arm in comparison.arms),
        notes=notes(config.folder()),
    )


def origin(name: str) -> str:
    """Return the base model's name; for a GGUF file also that its weights are dequantised."""
    file = name.rstrip("/").rpartition("/")[2]
    return f"{file.partition('.')[0]} (dequantised from {file})" if file.endswith(".gguf") else name


def best_config(comparison: Comparison, record: ComparisonRecord) -> Config | None:
    """Return the user's config with the overrides and the rate of the arm that has the lowest loss; None without one.

    Dropout and weight decay are those of the comparison.
    """
    best = record.best()
    if best is None or best.tuned is None:
        return None
    arm = next(arm for arm in comparison.arms if arm.name == best.name)
    compared = override(comparison.config, comparison.trial(arm, best.tuned.factor, comparison.own.run.seed).values)
    changes = {"adapter": compared.adapter.model_dump(mode="json"), "train": compared.train.model_dump(mode="json")}
    changes["train"]["early_stop"] = comparison.own.train.early_stop
    return override(comparison.own, {**changes, "run.name": f"{comparison.config.run.name}-best"})


def _counts(run: Run, tuning: TuningResult, measured: RowLosses | None) -> tuple[dict[str, int], int]:
    """Return (rows of each set, groups of test rows)."""
    # A test row that is too long has no loss, so it is left out of the counts.
    groups = run.rows.groups
    independent = len({number for each in groups.values() for number in each})
    rows, groups_left = measured.counts(groups) if measured else (run.rows.counts["test"], independent)
    return {**run.rows.counts, "tuning": tuning.rows, "test": rows}, groups_left


def _differences(
    comparison: Comparison, finals: Sequence[Final], groups: Mapping[str, Sequence[int]]
) -> dict[str, Against]:
    """Return arm -> its difference to the baseline, for arms that have losses with every seed."""
    measured = {arm.name: pair for arm in comparison.arms if (pair := _losses(finals, arm, groups)) is not None}
    if comparison.baseline.name not in measured:
        return {}
    losses, tokens = measured.pop(comparison.baseline.name)
    # For all arms that were asked for: an arm that broke off was a comparison, too.
    together = simultaneous(LEVEL, len(comparison.arms) - 1)
    # Differences row by row and seed by seed: most of the spread between rows is common to both arms and cancels.
    return {name: _against(per_token(own - losses, tokens), together) for name, (own, _) in measured.items()}


def _against(values: Values, level: float) -> Against:
    difference, spread = crossed(values), float(values.mean(axis=1).std(ddof=1))
    intervals = difference.interval(LEVEL), difference.interval(level)
    return Against(difference.mean, difference.error, difference.freedom, spread, *intervals)


def _losses(finals: Sequence[Final], arm: Arm, groups: Mapping[str, Sequence[int]]) -> tuple[Values, Values] | None:
    """Return an arm's (losses (seeds, groups), tokens (groups,))."""
    rows = [each.losses for each in finals if each.trial.arm == arm]
    # A mean over the seeds that did not break off would favour an arm that often does, so there is none.
    if not rows or None in rows:
        return None
    summed = [each.by_group(groups) for each in rows if each is not None]
    return np.stack([losses for losses, _ in summed]), summed[0][1]


def _arm(
    run: Run,
    tuning: TuningResult,
    points: Sequence[Point],
    arm: Arm,
    finals: Sequence[Final],
    against: Against | None,
) -> ArmRecord:
    losses, tuned = _losses(finals, arm, run.rows.groups), tuning.tuned.get(arm.name)
    trained = [each for each in finals if each.trial.arm == arm]
    mean = crossed(per_token(*losses)) if losses else None
    seconds = [each.record.seconds for trial, each in tuning.trials if trial.arm == arm]
    rated = run.comparison.trial(arm, tuned.factor, run.config.run.seed) if tuned else None
    return ArmRecord(
        name=arm.name,
        values=arm.values,
        tuned=tuned,
        lr=_rate(tuning, rated) if rated else None,
        own_loss=next(
            point.loss for point in points if (point.arm, point.factor) == (arm.name, run.comparison.own_factor())
        ),
        trainings=tuple(_training(run, each) for each in trained),
        loss=mean.mean if mean else None,
        half=mean.half(LEVEL) if mean else None,
        against=against,
        init_seconds=run.init_seconds(arm),
        tunings=len(seconds),
        tuning_seconds=sum(seconds),
        trainable=next((each.losses.trainable for each in trained if each.losses), None),
    )


def _rate(tuning: TuningResult, trial: Trial) -> float | None:
    """Return the peak learning rate of a trial; None if it is automatic and no training of the arm measured it."""
    rate, factor = trial.values[LR], float(trial.values[FACTOR])
    if rate != "auto":
        return float(rate) * factor
    results = (_result(each.record.folder) for other, each in tuning.trials if other.arm == trial.arm)
    return next((each.state.lr * factor for each in results if each and each.state and each.state.lr), None)


def _training(run: Run, final: Final) -> Training:
    record, loss, scores = final.ended.record, final.losses.mean() if final.losses else math.inf, {}
    if run.config.evaluation.scorer and (result := _result(record.folder)):
        answered = answers.answered(result, run.base.tokenizer)
        scores = answers.score(final.ended.spec.config, answered).get("after", {})
    return Training(final.trial.seed, loss, record.curve, scores, record.folder, record.mlflow_run)


def _result(folder: str) -> TrainResult | None:
    # A training that broke off has no result.
    try:
        return TrainResult.from_json(storage.read_text(storage.join(folder, "training.json")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
