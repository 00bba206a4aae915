"""Gate for a new version: a pure function of the results of two models on the same held-out rows.

    improvement  how much better the challenger's metric is than the champion's: losses and perplexity count
                 downwards, scores upwards
    passed       the lower end of its paired bootstrap interval lies above gate.must_improve_by, and every condition
                 of gate.and holds

So chance alone rarely passes: a challenger that is as good as the champion passes in about one of forty nights. With
`gate.confident: false` the improvement itself decides, and such a challenger passes every second night. Without a
champion only the conditions count. A challenger's value that is not a number never passes, and fewer than gate.min_rows
independent rows are not compared.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from olora_ray.common.text import plural
from olora_ray.config.schema import Condition, Gate
from olora_ray.evaluation.rows import SCORE, RowResults, improvement, lower_is_better

# Confidence of the improvement's interval.
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


def _compared(
    gate: Gate, challenger: RowResults, champion: RowResults, held_out: HeldOut
) -> tuple[bool, str, dict[str, Any]]:
    groups, unseen, left_out = held_out.groups, held_out.unseen, ""

    def keep(rows: Sequence[int]) -> None:
        nonlocal challenger, champion, groups
        challenger, champion = challenger.only(rows), champion.only(rows)
        groups = [groups[row] for row in rows] if groups is not None else None

    if unseen is not None and len(unseen) < len(challenger.losses):
        left_out = f" (left out: {len(challenger.losses) - len(unseen)} that the champion may have been trained on)"
        keep(unseen)
    if unseen is not None and not _shared_rows(gate.metric, challenger, champion):
        of_those = "" if lower_is_better(gate.metric) else " among the answered rows (evaluation.rows)"
        return False, f"{gate.metric}: no held-out row{of_those} is left to compare on{left_out}", {"groups": 0}
    if not lower_is_better(gate.metric):
        challenger, champion, counted = _scored_alike(gate.metric, challenger, champion)
        left_out += counted
    elif broken := [row for row, loss in enumerate(champion.losses) if not math.isfinite(loss)]:
        # Otherwise no challenger could ever replace it. A challenger must have a finite loss on these rows, too.
        told = f"the champion's loss is not finite on {plural(len(broken), 'row')}"
        if any(not math.isfinite(loss) for loss in challenger.losses):
            return False, f"{gate.metric}: {told}, and the challenger's is not finite either", {"groups": 0}
        keep([row for row in range(len(champion.losses)) if row not in broken])
        if len(champion.losses) < gate.min_rows:
            return True, f"{gate.metric}: {told}, so any finite loss is better{left_out}", {"groups": 0}
        left_out += f" (left out: {told})"
    gain = improvement(gate.metric, challenger, champion, LEVEL, groups)
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
        passed, missed = interval.mean > gate.must_improve_by, "the improvement must be above"
    return passed, text if passed else f"{text}, but {missed} {gate.must_improve_by:g}", numbers


def _scored_alike(metric: str, challenger: RowResults, champion: RowResults) -> tuple[RowResults, RowResults, str]:
    """Give the lowest score of both to a row that only one of them has; return both, and how often that was done."""
    # A scorer may leave out an answer that it cannot read. On the other rows alone, a model that answers only easy
    # questions would win.
    name = metric.removeprefix(SCORE)
    ours, theirs = challenger.scores.get(name, {}), champion.scores.get(name, {})
    both = ours.keys() | theirs.keys()
    if ours.keys() == theirs.keys() or not ours.keys() & theirs.keys():
        return challenger, champion, ""
    lowest = min(*ours.values(), *theirs.values())
    filled = ({**dict.fromkeys(both, lowest), **scores} for scores in (ours, theirs))
    challenger, champion = (
        replace(each, scores={**each.scores, name: scores})
        for each, scores in zip((challenger, champion), filled, strict=True)
    )
    missing = f"{plural(len(both - ours.keys()), 'row')} of the challenger, {len(both - theirs.keys())} of the champion"
    return challenger, champion, f" (no score, counted as {lowest:g}: {missing})"


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
