"""Gate for a new version: a pure function of the results of two models on the same held-out rows.

    improvement  how much better the challenger's metric is than the champion's: losses and perplexity count
                 downwards, scores upwards
    passed       the lower end of its paired bootstrap interval lies above gate.must_improve_by, every condition of
                 gate.and holds, and the challenger is not worse than the best champions by more than gate.anchor and
                 gate.guard_margin; of preference pairs, not worse than the champion on the chosen answers by more
                 than gate.chosen_margin

One wrong promotion in 40 nights would be nine in a year that nobody watches, so the interval is stricter than 95%. Rows
that are used again hardly add to the error: the champion's luck on them is a bar for the others. New rows do add, so
each set of rows in a year gets its share of the error. benchmarks/gate_years.py, at the tag before-open, simulates
years, and chose the numbers.

A challenger that is better on its task, but fails a limit on harm elsewhere (anchor, guard, chosen answers, other
rows), may be shrunk: its change times 0.75, 0.5 or 0.25, and the first that passes everything is promoted. That is four
looks a night instead of one, yet a night's error stays what it was:

- If the whole change is not better, it must pass its own comparison by luck before anything is shrunk, at the usual
  level. So shrinking adds no error here.
- If the whole change is better, but a shrunk one is not, or does harm, that one must pass by luck. Each interval of a
  shrunk change has a quarter of the usual error, so the three together have less than the usual one.

With `gate.confident: false` the improvement itself decides. Without a champion only the conditions count. A
challenger's value that is not a number never passes, and fewer than gate.min_rows independent rows are not compared.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from olora_ray.common.text import plural
from olora_ray.config.nights import Condition, Gate
from olora_ray.config.schema import OF_PAIRS
from olora_ray.evaluation.rows import (
    LOSS,
    PAIRS_LOSS,
    SCORE,
    RowResults,
    lower_is_better,
)

LEVEL = 0.95
"""Confidence of the intervals against anchor and guard."""
SHRUNK = (0.75, 0.5, 0.25)
"""Factors of a challenger's change, in the order in which they are tried."""
LOOKS = 1 + len(SHRUNK)
"""The error of each interval of a shrunk challenger is divided by this (Bonferroni)."""
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
    harms: bool = False
    """True if the challenger is better on its task, but fails a limit on harm elsewhere."""


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
    looks: int = 1,
) -> Decision:
    """Return the gate's decision; `champion` is None if there is none yet.

    `anchor` has the results of the best champion so far (None: the champion's). `guard` has the results on the guard
    rows of the challenger and of the champion that is best there; None: no guard, or nothing to compare with. The error
    of each interval is divided by `looks`.
    Raises UserError for a metric that was not measured, or for results on different rows.
    """
    gate = gate.model_copy(update={"metric": metric_of(gate, challenger)})
    checks = [_check(condition, challenger) for condition in gate.conditions]
    details: dict[str, Any] = {
        "metric": gate.metric,
        "challenger": _metrics(challenger),
        "champion": champion and _metrics(champion),
        "rows": len(challenger.column(gate.metric).rows),
        "conditions": [{"holds": holds, "text": text} for holds, text in checks],
    }
    elsewhere = []
    better = False
    level = 1 - (1 - LEVEL) / looks
    if champion is None:
        value = f"{gate.metric} {challenger.metric(gate.metric):.4f}, no champion to compare with"
        checks.insert(0, (True, value))
    else:
        better, text, numbers = _compared(gate, challenger, champion, held_out, looks)
        checks.insert(0, (better, text))
        details |= numbers
        if better and gate.anchor is not None:
            best = anchor or champion
            holds, text, details["anchor"] = _not_worse(
                gate.metric, challenger, best, held_out, gate, "anchor", level
            )
            elsewhere.append((holds, text))
        for name, check in _of_pairs(gate, challenger, champion, held_out, level):
            holds, text, details[name] = check
            elsewhere.append((holds, f"{name}: {text}"))
    if guard:
        holds, text, details["guard"] = _not_worse(
            LOSS, *guard, HeldOut(), gate, "guard_margin", level
        )
        elsewhere.append((holds, f"guard: {text}"))
    harms = better and not all(holds for holds, _ in elsewhere)
    checks += elsewhere
    passed = all(holds for holds, _ in checks)
    # A refusal names only the failed checks.
    shown = [text for holds, text in checks if holds is passed]
    return Decision(passed, "; ".join(shown), details, harms=harms)


def metric_of(gate: Gate, results: RowResults) -> str:
    """Return `gate.metric`, decided by the held-out rows if it is `auto`."""
    if gate.metric != "auto":
        return gate.metric
    return PAIRS_LOSS if results.pairs() else LOSS


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
    gate: Gate, challenger: RowResults, champion: RowResults, held_out: HeldOut, looks: int
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
        if not (lower_is_better(gate.metric) or gate.metric in OF_PAIRS):
            where = " among the answered rows (evaluation.rows)"
        why = f"{gate.metric}: no held-out row{where} is left to compare on{left_out}"
        return False, why, {"groups": 0}
    broken = []
    if lower_is_better(gate.metric):
        broken = _broken(gate.metric, champion)
    else:
        challenger, champion, counted = _scored_alike(gate.metric, challenger, champion)
        left_out += counted
    if broken:
        # Otherwise no challenger could ever replace it. A challenger must have a finite loss on these rows, too.
        told = f"the champion's loss is not finite on {plural(len(broken), 'row')}"
        if _broken(gate.metric, challenger):
            why = f"{gate.metric}: {told}, and the challenger's is not finite either"
            return False, why, {"groups": 0}
        rest = [row for row in range(unseen) if row not in broken]
        challenger = challenger.only(rest)
        champion = champion.only(rest)
        if len(champion.column(gate.metric).rows) < gate.min_rows:
            why = f"{gate.metric}: {told}, so any finite loss is better{left_out}"
            return True, why, {"groups": 0}
        left_out += f" (left out: {told})"
    both = sorted(_shared_rows(gate.metric, challenger, champion))
    ours = challenger.only(both)
    theirs = champion.only(both)
    text = f"{gate.metric} {ours.metric(gate.metric):.4f}, the champion's {theirs.metric(gate.metric):.4f}"
    level = 1 - 0.05 / max(SETS, held_out.sets) / looks
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


def _broken(metric: str, results: RowResults) -> list[int]:
    """Return the rows on which a metric is not finite."""
    column = results.column(metric)
    broken: list[int] = column.rows[~np.isfinite(column.values)].tolist()
    return broken


def _not_worse(
    metric: str,
    ours: RowResults,
    best: RowResults,
    held_out: HeldOut,
    gate: Gate,
    field: str,
    level: float,
) -> Checked:
    """Check that the challenger is worse than the best champion by at most the margin `field`, with confidence.

    `level` is that of the interval.
    """
    value = best.metric(metric)
    if not math.isfinite(value):
        return True, f"{metric}: the best champion's is not finite", {}
    ours = _considered(ours, held_out)
    best = _considered(best, held_out)
    if not lower_is_better(metric):
        ours, best, _ = _scored_alike(metric, ours, best)
    gain = ours.gain(best, metric, level)
    whose = "the champion's" if field == "chosen_margin" else "the best champion's"
    text = f"{metric} {ours.metric(metric):.4f}, {whose} {value:.4f}: {gain.shown(level)}"
    margin = getattr(gate, field)
    holds = gain.interval.low > -margin
    if not holds:
        text += f", but the interval must lie above -{margin:g} (gate.{field})"
    return holds, text, asdict(gain.interval)


def _of_pairs(
    gate: Gate, challenger: RowResults, champion: RowResults, held_out: HeldOut, level: float
) -> Iterator[tuple[str, Checked]]:
    """Yield the checks of held-out pairs: their chosen answers, and the rows that the gate's metric leaves out."""
    ours = _considered(challenger, held_out)
    theirs = _considered(champion, held_out)
    pairs = ours.pairs()
    plain = sorted(set(range(len(ours.losses))) - set(pairs))
    checked = [("chosen answers", LOSS, pairs)]
    if gate.metric in OF_PAIRS:
        checked.append(("other rows", LOSS, plain))
    else:
        checked.append(("pairs", PAIRS_LOSS, pairs))
    for name, metric, rows in checked:
        if pairs and rows:
            yield (
                name,
                _not_worse(
                    metric,
                    ours.only(rows),
                    theirs.only(rows),
                    HeldOut(),
                    gate,
                    "chosen_margin",
                    level,
                ),
            )


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
