"""Gate for a new version: a pure function of what two models do on the same held-out rows.

    improvement  how much better the challenger's metric is than the champion's: losses and perplexity count
                 downwards, scores upwards
    passed       the improvement is at least gate.must_improve_by, and every condition of gate.and holds

With gate.confident the lower end of the paired bootstrap interval of the improvement must reach
gate.must_improve_by as well: then a pass is more than luck of the rows. The interval is always reported.
Without a champion only the conditions count. Whatever is not a number passes nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any

from olora_ray.config.schema import Condition, Gate
from olora_ray.evaluation.bootstrap import Interval
from olora_ray.evaluation.rows import LOSS, PERPLEXITY, RowResults, compare


@dataclass(frozen=True)
class Decision:
    """The gate's verdict."""

    passed: bool
    reason: str
    """One line for a person."""
    details: dict[str, Any]
    """The numbers behind it, as JSON has them."""


def decide(gate: Gate, challenger: RowResults, champion: RowResults | None) -> Decision:
    """Apply the gate; `champion` is None if there is none yet.

    Raises UserError for a metric that was not measured, or for results on other rows.
    """
    checks = [_check(condition, challenger) for condition in gate.conditions]
    details: dict[str, Any] = {
        "metric": gate.metric,
        "challenger": {name: challenger.metric(name) for name in challenger.names()},
        "champion": {name: champion.metric(name) for name in champion.names()} if champion else None,
        "rows": len(challenger.rows(gate.metric)[0]),
        "conditions": [{"holds": holds, "text": text} for holds, text in checks],
    }
    if champion is None:
        value = f"{gate.metric} {challenger.metric(gate.metric):.4f}, no champion to compare with"
        checks.insert(0, (True, value))
    else:
        found = improvement(gate, challenger, champion)
        details |= {"improvement": asdict(found), "level": gate.level}
        checks.insert(0, _compared(gate, challenger, champion, found))
    passed = all(holds for holds, _ in checks)
    shown = [text for holds, text in checks if holds is passed]  # of a refusal only what failed
    return Decision(passed, "; ".join(shown), details)


def improvement(gate: Gate, challenger: RowResults, champion: RowResults) -> Interval:
    """Improvement of the challenger's metric over the champion's, with its paired interval; above 0 is better."""
    found = compare(gate.metric, challenger, champion, gate.level)
    if not lower_is_better(gate.metric):
        return found
    return Interval(0.0 - found.mean, 0.0 - found.high, 0.0 - found.low)  # not -x: it would give -0.0


def lower_is_better(metric: str) -> bool:
    """Whether a small value of the metric is good."""
    return metric in (LOSS, PERPLEXITY)


def _compared(gate: Gate, challenger: RowResults, champion: RowResults, found: Interval) -> tuple[bool, str]:
    enough = found.mean >= gate.must_improve_by
    sure = found.low >= gate.must_improve_by
    ours, theirs = challenger.metric(gate.metric), champion.metric(gate.metric)
    text = (
        f"{gate.metric} {ours:.4f}, the champion's {theirs:.4f}: improved by {found.mean:.4f}"
        f" ({gate.level:.0%} interval {found.low:.4f} to {found.high:.4f},"
        f" {len(challenger.rows(gate.metric)[0])} rows)"
    )
    if enough and (sure or not gate.confident):
        return True, text
    what = "the interval must begin" if enough else "it must improve"
    return False, f"{text}, but {what} {'at' if enough else 'by'} {gate.must_improve_by:g} at least"


def _check(condition: Condition, results: RowResults) -> tuple[bool, str]:
    value, name = results.metric(condition.metric), condition.metric
    if condition.at_least is not None and not value >= condition.at_least:
        return False, f"{name} {value:.4f} is below {condition.at_least:g}"
    if condition.at_most is not None and not value <= condition.at_most:
        return False, f"{name} {value:.4f} is above {condition.at_most:g}"
    return True, f"{name} {value:.4f}"
