"""The analysis of a comparison: from the losses on each test row to differences with their intervals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from comparison.arguments import LEVEL
from comparison.folder import notes
from comparison.grid import BASELINE, tried
from comparison.record import Against, ComparisonRecord, Course, MethodRecord, Point, Reached, Training, reached
from comparison.run import Final, Run, Tuning
from comparison.statistics import Difference, Values, crossed, holm, per_token, simultaneous
from olora_ray.cluster.spec import TrainResult
from olora_ray.common import storage
from olora_ray.pipeline import answers


def record(run: Run, tuning: Tuning, finals: Sequence[Final], machine: str) -> ComparisonRecord:
    comparison, config = run.comparison, run.config
    against = differences(comparison.methods, finals, run.rows.groups)
    bases = [base for each in finals if (base := each.ended.base()) is not None]
    measured = next((each for each in finals if each.losses), None)
    counts, groups = _counts(run, tuning, measured)
    return ComparisonRecord(
        name=config.run.name,
        model=run.base.model.name,
        task=", ".join(source.path.rstrip("/").rpartition("/")[2] for source in config.data.train),
        machine=machine,
        seconds=run.seconds(),
        tuning_seed=config.run.seed,
        seeds=comparison.seeds,
        rank=config.adapter.rank,
        alpha=float(config.adapter.alpha),
        lr=0.0 if config.train.lr == "auto" else config.train.lr,
        steps=measured.ended.record.total if measured else 0,
        global_batch=config.train.global_batch,
        rows=counts,
        groups=groups,
        relevant=comparison.compare.relevant,
        level=LEVEL,
        base_tuning=tuning.base,
        base_test=bases[0] if bases else math.inf,
        points=_points(run, tuning),
        methods=tuple(_method(run, tuning, method, finals, against.get(method)) for method in comparison.methods),
        notes=notes(config.folder()),
    )


def _counts(run: Run, tuning: Tuning, measured: Final | None) -> tuple[dict[str, int], int]:
    """Return (rows of each set, groups of test rows)."""
    # A test row that is too long has no loss, so it is left out of the counts.
    groups = run.rows.groups
    if measured is None or measured.losses is None:
        rows, independent = run.rows.counts["test"], len({number for each in groups.values() for number in each})
    else:
        rows, independent = measured.losses.counts(groups)
    return {**run.rows.counts, "tuning": tuning.rows, "test": rows}, independent


def differences(
    methods: Sequence[str], finals: Sequence[Final], groups: Mapping[str, Sequence[int]]
) -> dict[str, Against]:
    """Return method -> its difference to the baseline, for methods that have losses with every seed."""
    measured = {method: pair for method in methods if (pair := _losses(finals, method, groups)) is not None}
    if BASELINE not in measured:
        return {}
    losses, tokens = measured.pop(BASELINE)
    # Differences row by row and seed by seed: most of the spread between rows is common to both methods and cancels.
    against = {method: crossed(per_token(own - losses, tokens)) for method, (own, _) in measured.items()}
    p_values = [each.p() for each in against.values()]
    together = simultaneous(LEVEL, len(against))
    adjusted = zip(against.items(), p_values, holm(p_values), strict=True)
    return {method: _against(each, p, p_holm, together) for (method, each), p, p_holm in adjusted}


def _against(difference: Difference, p: float, p_holm: float, level: float) -> Against:
    return Against(
        mean=difference.mean,
        error=difference.error,
        freedom=difference.freedom,
        interval=difference.interval(LEVEL),
        adjusted=difference.interval(level),
        p=p,
        p_holm=p_holm,
    )


def _losses(finals: Sequence[Final], method: str, groups: Mapping[str, Sequence[int]]) -> tuple[Values, Values] | None:
    """Return a method's (losses (seeds, groups), tokens (groups,))."""
    rows = [each.losses for each in sorted(finals, key=lambda each: each.seed) if each.method == method]
    # A mean over the seeds that did not break off would favour a method that often does, so there is none.
    if not rows or None in rows:
        return None
    summed = [each.by_group(groups) for each in rows if each is not None]
    return np.stack([losses for losses, _ in summed]), summed[0][1]


def _method(run: Run, tuning: Tuning, method: str, finals: Sequence[Final], against: Against | None) -> MethodRecord:
    own = _losses(finals, method, run.rows.groups)
    mean = crossed(per_token(*own)) if own else None
    init, exchanged = run.initialisation(method)
    targets = {each.seed: each.ended.loss for each in finals if each.method == BASELINE}
    trained = sorted((each for each in finals if each.method == method), key=lambda each: each.seed)
    return MethodRecord(
        method=method,
        tuned=tuning.best.get(method),
        trainings=tuple(_training(run, each, targets[each.seed], init) for each in trained),
        loss=mean.mean if mean else None,
        half=mean.half(LEVEL) if mean else None,
        against=against,
        init_seconds=init,
        exchanged=exchanged,
        trainable=run.sizes[method].trainable,
    )


def _training(run: Run, final: Final, target: float, init: float) -> Training:
    record = final.ended.record
    result = _result(record.folder)
    course = Course.of(result.state.history if result and result.state else ())
    loss = final.losses.mean() if final.losses else math.inf
    scored = result and run.config.evaluation.scorer
    return Training(
        seed=final.seed,
        loss=loss,
        curve=course.points() or record.curve,
        reached=_reached(course, target, init) if math.isfinite(loss) and math.isfinite(target) else None,
        scores=answers.score(final.spec.config, answers.answered(result, run.base.tokenizer)).get("after", {})
        if scored and result
        else {},
        folder=record.folder,
        mlflow_run=record.mlflow_run,
    )


def _reached(course: Course, target: float, init: float) -> Reached | None:
    return reached(course, target, init) if course.steps else None


def _result(folder: str) -> TrainResult | None:
    # A training that broke off has no result.
    try:
        return TrainResult.from_json(storage.read_text(storage.join(folder, "training.json")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _points(run: Run, tuning: Tuning) -> tuple[Point, ...]:
    on_grid = tried(run.comparison.arms(), tuning.losses)
    points = [Point(cell.method, cell.alpha, cell.lr, loss, cell in on_grid) for cell, loss in tuning.losses.items()]
    return tuple(sorted(points, key=lambda point: (not point.grid, point.method, point.alpha, point.lr)))
