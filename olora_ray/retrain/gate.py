"""Gate for a new version: a pure function of the results of two models on the same held-out rows.

    improvement  how much better the challenger's metric is than the champion's: losses and perplexity count
                 downwards, scores upwards
    passed       the lower end of its paired bootstrap interval lies above gate.must_improve_by, every condition of
                 gate.and holds, and the challenger is not worse than the best champions by more than gate.anchor and
                 gate.guard_margin

One wrong promotion in 40 nights would be nine in a year that nobody watches, so the interval is stricter than 95%. Rows
that are used again hardly add to the error: the champion's luck on them is a bar for the others. New rows do add, so
each set of rows in a year gets its share of the error. benchmarks/gate_years.py, at the tag before-open, simulates
years, and chose the numbers.

With `gate.confident: false` the improvement itself decides. Without a champion only the conditions count. A
challenger's value that is not a number never passes, and fewer than gate.min_rows independent rows are not compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from olora_ray.common.text import plural
from olora_ray.config.nights import Condition, Gate
from olora_ray.evaluation.rows import (
    LOSS,
    SCORE,
    RowResults,
    lower_is_better,
)

LEVEL = 0.95
"""Confidence of the intervals against anchor and guard."""
SETS = 20
"""Up to this many different sets of held-out rows in a year, each interval has the level 1 - 0.05 / 20."""


Checked = tuple[bool, str, dict[str, Any]]
"""True if a check holds, what it found, and the numbers behind it."""


@dataclass(frozen=True)
class Decision:
    passed: bool
    reason: str
    """One line for people."""
    details: dict[str, Any]
    """The numbers behind the decision, as JSON types."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of the version."""


@dataclass(frozen=True)
class HeldOut:
    """Facts about the held-out rows that the models' results do not contain."""

    groups: Sequence[object] | None = None
    """Name of the group of each row, by its contents; None: each row of a file is its own group."""
    unseen: Sequence[int] | None = None
    """Numbers of the rows that the champion was certainly not trained on; None: all."""
    sets: int = 1
    """Number of different sets of held-out rows on which versions were judged within a year, this set included."""


def decide(
    gate: Gate,
    challenger: RowResults,
    champion: RowResults | None,
    held_out: HeldOut = HeldOut(),
    anchor: RowResults | None = None,
    guard: tuple[RowResults, RowResults] | None = None,
) -> Decision:
    """Return the gate's decision; `champion` is None if there is none yet.

    `anchor` has the results of the best champion so far (None: the champion's). `guard` has the results on the guard
    rows of the challenger and of the champion that is best there; None: no guard, or nothing to compare with.
    Raises UserError for a metric that was not measured, or for results on different rows.
    """
    checks = [_check(condition, challenger) for condition in gate.conditions]
    details: dict[str, Any] = {
        "metric": gate.metric,
        "challenger": _metrics(challenger),
        "champion": champion and _metrics(champion),
        "rows": len(challenger.column(gate.metric).rows),
        "conditions": [{"holds": holds, "text": text} for holds, text in checks],
    }
    if champion is None:
        value = f"{gate.metric} {challenger.metric(gate.metric):.4f}, no champion to compare with"
        checks.insert(0, (True, value))
    else:
        holds, text, numbers = _compared(gate, challenger, champion, held_out)
        checks.insert(0, (holds, text))
        details |= numbers
        if holds and gate.anchor is not None:
            best = anchor or champion
            holds, text, details["anchor"] = _not_worse(
                gate.metric, challenger, best, held_out, gate, "anchor"
            )
            checks.append((holds, text))
    if guard:
        holds, text, details["guard"] = _not_worse(LOSS, *guard, HeldOut(), gate, "guard_margin")
        checks.append((holds, f"guard: {text}"))
    passed = all(holds for holds, _ in checks)
    # A refusal names only the failed checks.
    shown = [text for holds, text in checks if holds is passed]
    return Decision(passed, "; ".join(shown), details)


def _metrics(results: RowResults) -> dict[str, float]:
    return {name: results.metric(name) for name in results.names()}


def _considered(results: RowResults, held_out: HeldOut) -> RowResults:
    """Return the results on the rows that count, in the groups of the rows."""
    if held_out.groups is not None:
        results = results.grouped(held_out.groups)
    if held_out.unseen is not None:
        results = results.only(held_out.unseen)
    return results


def _compared(
    gate: Gate, challenger: RowResults, champion: RowResults, held_out: HeldOut
) -> Checked:
    total = len(challenger.losses)
    challenger = _considered(challenger, held_out)
    champion = _considered(champion, held_out)
    unseen = len(challenger.losses)
    left_out = ""
    if unseen < total:
        left_out = f" (left out: {total - unseen} that the champion may have been trained on)"
    if held_out.unseen is not None and not _shared_rows(gate.metric, challenger, champion):
        where = ""
        if not lower_is_better(gate.metric):
            where = " among the answered rows (evaluation.rows)"
        why = f"{gate.metric}: no held-out row{where} is left to compare on{left_out}"
        return False, why, {"groups": 0}
    broken = []
    if lower_is_better(gate.metric):
        broken = [row for row, loss in enumerate(champion.losses) if not math.isfinite(loss)]
    else:
        challenger, champion, counted = _scored_alike(gate.metric, challenger, champion)
        left_out += counted
    if broken:
        # Otherwise no challenger could ever replace it. A challenger must have a finite loss on these rows, too.
        told = f"the champion's loss is not finite on {plural(len(broken), 'row')}"
        if not all(map(math.isfinite, challenger.losses)):
            why = f"{gate.metric}: {told}, and the challenger's is not finite either"
            return False, why, {"groups": 0}
        rest = [row for row in range(unseen) if row not in broken]
        challenger = challenger.only(rest)
        champion = champion.only(rest)
        if len(champion.losses) < gate.min_rows:
            why = f"{gate.metric}: {told}, so any finite loss is better{left_out}"
            return True, why, {"groups": 0}
        left_out += f" (left out: {told})"
    both = sorted(_shared_rows(gate.metric, challenger, champion))
    ours = challenger.only(both)
    theirs = champion.only(both)
    text = f"{gate.metric} {ours.metric(gate.metric):.4f}, the champion's {theirs.metric(gate.metric):.4f}"
    level = 1 - 0.05 / max(SETS, held_out.sets)
    gain = ours.gain(theirs, gate.metric, level)
    numbers = {"improvement": asdict(gain.interval), "level": level, "groups": gain.groups}
    text += f": {gain.shown(level)}{left_out}"
    if gain.groups < gate.min_rows:
        problem = f"gate.min_rows={gate.min_rows} needs more independent rows"
        return False, f"{text}, but {problem}", numbers
    if gate.confident:
        passed = gain.interval.low > gate.must_improve_by
        needed = "interval must begin"
    else:
        passed = gain.interval.mean > gate.must_improve_by
        needed = "improvement must be"
    if not passed:
        return False, f"{text}, but the {needed} above {gate.must_improve_by:g}", numbers
    return True, text, numbers


def _not_worse(
    metric: str, ours: RowResults, best: RowResults, held_out: HeldOut, gate: Gate, field: str
) -> Checked:
    """Check that the challenger is worse than the best champion by at most the margin `field`, with confidence."""
    value = best.metric(metric)
    if not math.isfinite(value):
        return True, f"{metric}: the best champion's is not finite", {}
    ours = _considered(ours, held_out)
    best = _considered(best, held_out)
    if not lower_is_better(metric):
        ours, best, _ = _scored_alike(metric, ours, best)
    gain = ours.gain(best, metric, LEVEL)
    text = (
        f"{metric} {ours.metric(metric):.4f}, the best champion's {value:.4f}: {gain.shown(LEVEL)}"
    )
    margin = getattr(gate, field)
    holds = gain.interval.low > -margin
    if not holds:
        text += f", but gate.{field}={margin:g} allows less"
    return holds, text, asdict(gain.interval)


def _scored_alike(
    metric: str, challenger: RowResults, champion: RowResults
) -> tuple[RowResults, RowResults, str]:
    """Give the lowest score of both to a row that only one of them has; return both, and how often that was done."""
    # A scorer may leave out an answer that it cannot read. On the other rows alone, a model that answers only easy
    # questions would win.
    name = metric.removeprefix(SCORE)
    ours = challenger.scores.get(name, {})
    theirs = champion.scores.get(name, {})
    both = ours.keys() | theirs.keys()
    if ours.keys() == theirs.keys() or not ours.keys() & theirs.keys():
        return challenger, champion, ""
    lowest = min(*ours.values(), *theirs.values())
    blank = dict.fromkeys(both, lowest)
    challenger = replace(challenger, scores={**challenger.scores, name: {**blank, **ours}})
    champion = replace(champion, scores={**champion.scores, name: {**blank, **theirs}})
    missing = f"{plural(len(both - ours.keys()), 'row')} of the challenger, {len(both - theirs.keys())} of the champion"
    return challenger, champion, f" (no score, counted as {lowest:g}: {missing})"


def _shared_rows(metric: str, ours: RowResults, theirs: RowResults) -> set[int]:
    """Return the rows on which both have the metric; raise UserError if one model has it nowhere."""
    return set(ours.column(metric).rows.tolist()) & set(theirs.column(metric).rows.tolist())


def _check(condition: Condition, results: RowResults) -> tuple[bool, str]:
    name = condition.metric
    value = results.metric(name)
    if condition.at_least is not None and not value >= condition.at_least:
        return False, f"{name} {value:.4f} is below {condition.at_least:g}"
    if condition.at_most is not None and not value <= condition.at_most:
        return False, f"{name} {value:.4f} is above {condition.at_most:g}"
    return True, f"{name} {value:.4f}"
