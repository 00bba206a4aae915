"""Importance of each searched field for the metric: fANOVA, by Optuna, over the trials of a search."""

from dataclasses import dataclass
from typing import Any

from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import axis as scale
from olora_ray.sweep.report import text
from olora_ray.sweep.report.axis import Scale

_MOST = 300  # trials that a forest is grown from
_FEWEST = 5  # with fewer trials a forest has nothing to split


@dataclass(frozen=True)
class Importance:
    """Shares of the metric's variance."""

    shares: tuple[tuple[tuple[str, ...], float], ...] = ()
    """(fields, share), the greatest first; fields that moved together in every trial share one. The sum is 1."""
    trials: int = 0
    """How many trials it is from."""
    why_not: str = ""
    """Why there are no shares."""

    def order(self) -> list[str]:
        """The fields, the most important first."""
        return [name for names, _ in self.shares for name in names]


def of(record: SearchRecord) -> Importance:
    """The importances of the searched fields, or why there are none. The same record gives the same numbers.

    Of a large search from `_MOST` trials, evenly from the best to the worst: the time that fANOVA takes grows with
    their square.
    """
    record = record.thinned(_MOST)
    trials = [trial for trial in record.ranked() if trial.status in ("finished", "stopped")]
    fields = [name for name in record.fields if any(name in trial.params for trial in trials)]
    scales = {name: scale.of(trial.params[name] for trial in trials if name in trial.params) for name in fields}
    # A forest takes no gaps.
    trials = [trial for trial in trials if all(_place(scales[name], trial, name) is not None for name in fields)]
    if len(trials) < _FEWEST:
        return Importance(trials=len(trials), why_not=f"too few trials: {len(trials)}, and {_FEWEST} are needed")
    metric = scale.of_metric([trial.value for trial in trials], record.mode)
    if metric.low == metric.high:
        return Importance(trials=len(trials), why_not="all trials have the same value")
    groups = _together(_columns(trials, scales), [trial.number != record.default for trial in trials])
    if not groups:
        return Importance(trials=len(trials), why_not="every field has one value only")
    found = _fanova(trials, {names[0]: scales[names[0]] for names in groups}, metric)
    shares = sorted(((names, found[names[0]]) for names in groups), key=lambda item: -item[1])
    if not any(share > 0 for _, share in shares):
        return Importance(trials=len(trials), why_not="no field explains the differences")
    return Importance(tuple(shares), len(trials))


def _place(axis: Scale, trial: TrialRecord, name: str) -> float | None:
    return axis.position(trial.params.get(name, float("nan")))


def _columns(trials: list[TrialRecord], scales: dict[str, Scale]) -> dict[str, list[float]]:
    """Field -> positions of the trials, without fields that never change."""
    columns = {name: [_place(axis, trial, name) or 0.0 for trial in trials] for name, axis in scales.items()}
    return {name: column for name, column in columns.items() if len(set(column)) > 1}


def _together(columns: dict[str, list[float]], searched: list[bool]) -> list[tuple[str, ...]]:
    """Groups of fields that put the searched trials in the same order, e.g. alpha = 2 x rank.

    Nothing can tell them apart but the default config, which need not follow the rule, and is one trial.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, column in columns.items():
        column = [value for value, counts in zip(column, searched, strict=True) if counts]
        places = {value: place for place, value in enumerate(sorted(set(column)))}
        ranks = tuple(places[value] for value in column)
        mirrored = tuple(len(places) - 1 - rank for rank in ranks)
        groups.setdefault(mirrored if mirrored in groups else ranks, []).append(name)
    return [tuple(names) for names in groups.values()]


def _fanova(trials: list[TrialRecord], scales: dict[str, Scale], metric: Scale) -> dict[str, float]:
    """Positions instead of values: Optuna weighs a logarithmic field by its plain values, and outliers too much."""
    import optuna

    kinds: dict[str, Any] = {
        name: optuna.distributions.CategoricalDistribution(axis.categories)
        if axis.kind == "category"
        else optuna.distributions.FloatDistribution(0.0, 1.0)
        for name, axis in scales.items()
    }
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(level)
    for trial in trials:
        given = {name: _given(axis, trial.params[name]) for name, axis in scales.items()}
        study.add_trial(
            optuna.trial.create_trial(params=given, distributions=kinds, value=metric.position(trial.value))
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


def _given(axis: Scale, value: Any) -> Any:
    return text.value(value) if axis.kind == "category" else axis.position(value)
