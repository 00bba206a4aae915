"""Gate for a new version: a pure function of the results of two models on the same held-out rows.

    improvement  how much better the challenger's metric is than the champion's: losses and perplexity count
                 downwards, scores upwards
    passed       the lower end of its paired bootstrap interval lies above gate.must_improve_by, and every condition
                 of gate.and holds

So chance alone rarely passes: a challenger that is as good as the champion passes in about one of forty nights. With
`gate.confident: false` the improvement itself decides, and such a challenger passes every second night. Without a
champion only the conditions count. A value that is not a number never passes, and fewer than gate.min_rows independent
rows are not compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from olora_ray.common.text import plural
from olora_ray.config.schema import Condition, Gate
from olora_ray.evaluation.rows import LOSS, PERPLEXITY, Comparison, Interval, RowResults, compare

# Confidence of the improvement's interval, and of the test for missing scores.
LEVEL = 0.95


@dataclass(frozen=True)
class Decision:
    passed: bool
    reason: str
    """One line for people."""
    details: dict[str, Any]
    """The numbers behind the decision, as JSON types."""


@dataclass(frozen=True)
class HeldOut:
    """Facts about the held-out rows that the models' results do not contain."""

    groups: Sequence[int] | None = None
    """Number of the group of each row; None: each row is its own group."""
    unseen: Sequence[int] | None = None
    """Numbers of the rows that the champion was certainly not trained on; None: all."""


def decide(
    gate: Gate, challenger: RowResults, champion: RowResults | None, held_out: HeldOut | None = None
) -> Decision:
    """Return the gate's decision; `champion` is None if there is none yet.

    Raises UserError for a metric that was not measured, or for results on different rows.
    """
    checks = [_check(condition, challenger) for condition in gate.conditions]
    details: dict[str, Any] = {
        "metric": gate.metric,
        "challenger": {name: challenger.metric(name) for name in challenger.names()},
        "champion": {name: champion.metric(name) for name in champion.names()} if champion else None,
        "rows": len(challenger.column(gate.metric).rows),
        "conditions": [{"holds": holds, "text": text} for holds, text in checks],
    }
    if champion is None:
        value = f"{gate.metric} {challenger.metric(gate.metric):.4f}, no champion to compare with"
        checks.insert(0, (True, value))
    else:
        holds, text, numbers = _compared(gate, challenger, champion, held_out or HeldOut())
        checks.insert(0, (holds, text))
        details |= numbers
    passed = all(holds for holds, _ in checks)
    shown = [text for holds, text in checks if holds is passed]  # a refusal names only the failed checks
    return Decision(passed, "; ".join(shown), details)


def improvement(
    gate: Gate, challenger: RowResults, champion: RowResults, groups: Sequence[int] | None = None
) -> Comparison:
    """Return how much better the challenger is (above 0: better), with the paired interval."""
    comparison = compare(gate.metric, challenger, champion, LEVEL, groups=groups)
    if not lower_is_better(gate.metric):
        return comparison
    was = comparison.interval
    return replace(comparison, interval=Interval(0.0 - was.mean, 0.0 - was.high, 0.0 - was.low))  # -x would give -0.0


def lower_is_better(metric: str) -> bool:
    return metric in (LOSS, PERPLEXITY)


def _compared(
    gate: Gate, challenger: RowResults, champion: RowResults, held_out: HeldOut
) -> tuple[bool, str, dict[str, Any]]:
    groups, unseen, left_out = held_out.groups, held_out.unseen, ""
    if unseen is not None and len(unseen) < len(challenger.losses):
        left_out = f" (left out: {len(challenger.losses) - len(unseen)} that the champion may have been trained on)"
        challenger, champion = challenger.only(unseen), champion.only(unseen)
        groups = [groups[row] for row in unseen] if groups is not None else None
    if unseen is not None and not _shared_rows(gate.metric, challenger, champion):
        of_those = "" if lower_is_better(gate.metric) else " among the answered rows (evaluation.rows)"
        return False, f"{gate.metric}: no held-out row{of_those} is left to compare on{left_out}", {"groups": 0}
    if (less := _scored_less(gate.metric, challenger, champion, groups)) is not None:
        return False, f"{less}{left_out}", {"groups": 0}
    gain = improvement(gate, challenger, champion, groups)
    interval = gain.interval
    rows = plural(gain.rows, "row") + (f" in {plural(gain.groups, 'group')}" if gain.groups < gain.rows else "")
    both = sorted(_shared_rows(gate.metric, challenger, champion))
    ours, theirs = (each.only(both).metric(gate.metric) for each in (challenger, champion))
    change = f"{'worse' if interval.mean < 0 else 'improved'} by {abs(interval.mean):.4f}"
    text = (
        f"{gate.metric} {ours:.4f}, the champion's {theirs:.4f}: {change} ({LEVEL:.0%} interval of the improvement"
        f" {interval.low:.4f} to {interval.high:.4f}, {rows}){left_out}"
    )
    numbers = {"improvement": asdict(interval), "level": LEVEL, "groups": gain.groups}
    if gain.groups < gate.min_rows:
        return False, f"{text}, but gate.min_rows={gate.min_rows} needs more independent rows", numbers
    if gate.confident:
        passed, missed = interval.low > gate.must_improve_by, "the interval must begin above"
    else:
        passed, missed = interval.mean >= gate.must_improve_by, "the improvement must be at least"
    return passed, text if passed else f"{text}, but {missed} {gate.must_improve_by:g}", numbers


def _scored_less(metric: str, challenger: RowResults, champion: RowResults, groups: Sequence[int] | None) -> str | None:
    """Return why the scores cannot be compared if the challenger lacks clearly more of them; else None."""
    # A scorer may leave out an answer that it cannot read. On the other rows alone, a model that answers only easy
    # questions would win. The test is a one-sided sign test at 2.5 % over groups of rows.
    ours, theirs = (set(each.column(metric).rows.tolist()) for each in (challenger, champion))
    own = groups if groups is not None else range(len(challenger.losses))
    net = Counter(own[row] for row in ours - theirs)
    from scipy.stats import binom  # type: ignore[import-untyped] # half a second

    net.subtract(own[row] for row in theirs - ours)
    more, fewer = (sum(sign * value > 0 for value in net.values()) for sign in (1, -1))
    if binom.cdf(more, more + fewer, 0.5) > (1 - LEVEL) / 2:
        return None
    return (
        f"{metric}: the challenger has no score on {plural(len(theirs - ours), 'row')} where the champion has one, so"
        " the scores cannot be compared; let the scorer return 0 for an answer that it cannot read"
    )


def _shared_rows(metric: str, ours: RowResults, theirs: RowResults) -> set[int]:
    """Return the rows on which both have the metric; raise UserError if one model has it nowhere."""
    return set(ours.column(metric).rows.tolist()) & set(theirs.column(metric).rows.tolist())


def _check(condition: Condition, results: RowResults) -> tuple[bool, str]:
    value, name = results.metric(condition.metric), condition.metric
    if condition.at_least is not None and not value >= condition.at_least:
        return False, f"{name} {value:.4f} is below {condition.at_least:g}"
    if condition.at_most is not None and not value <= condition.at_most:
        return False, f"{name} {value:.4f} is above {condition.at_most:g}"
    return True, f"{name} {value:.4f}"
