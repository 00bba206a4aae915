"""The verdict of a comparison in sentences: a difference is never named without its interval and what it is of."""

import math

from olora_ray.common.text import plural
from olora_ray.sweep.compare.grid import BASELINE
from olora_ray.sweep.compare.record import Against, ComparisonRecord, MethodRecord
from olora_ray.sweep.report import text

ERROR = 0.05
"""p value below which a difference is named."""


def sentences(record: ComparisonRecord) -> list[str]:
    """One for each method but the baseline."""
    return [sentence(record, each) for each in record.others()]


def sentence(record: ComparisonRecord, method: MethodRecord) -> str:
    """What the comparison says of a method, and of what it says it."""
    if method.against is None:
        return f"{method.method} against {BASELINE}: no difference can be named: {_why_not(record, method)}."
    found = method.against
    rates = f"each at the learning rate that was best on {record.rows['tuning']} other rows"
    return (
        f"{method.method} - {BASELINE} = {found.mean:+.4f} nats per token, {_interval(record, found)}, over"
        f" {plural(len(record.seeds), 'seed')} x {_rows(record)} of {record.task} with {record.model}, {rates}:"
        f" {conclusion(found, record.relevant)}.{_reservations(record, method)}"
    )


def conclusion(found: Against, relevant: float) -> str:
    """What the comparison shows, in words: that there is a difference by Holm's p value, how large by the interval."""
    low, high = found.adjusted.low, found.adjusted.high
    bound, lower, differs = f"{relevant:g}", found.mean < 0, found.p_holm < ERROR
    if found.adjusted.inside(relevant):
        which = f"; the loss is {'lower' if lower else 'higher'} by less than that" if differs else ""
        return f"equivalent within the {bound} that was fixed beforehand as the smallest difference that matters{which}"
    if not differs:
        return f"undecided: neither a difference nor equivalence within {bound} is shown"
    word = "lower" if lower else "higher"
    if high <= -relevant or low >= relevant:
        return f"the loss is {word}, by {bound} or more"
    return f"the loss is {word}; whether by the {bound} that matters is undecided"


def _interval(record: ComparisonRecord, found: Against) -> str:
    low, high = found.adjusted.low, found.adjusted.high
    others = len([each for each in record.others() if each.against])
    adjusted = f" for {others} comparisons together, p = {text.number(found.p_holm, 2)} (Holm)" if others > 1 else ""
    return f"{record.level:.0%} interval {low:+.4f} .. {high:+.4f}{adjusted}"


def _rows(record: ComparisonRecord) -> str:
    rows = record.rows["test"]
    return f"{rows} test rows" if record.groups == rows else f"{record.groups} groups of {rows} test rows"


def _why_not(record: ComparisonRecord, method: MethodRecord) -> str:
    for each in (record.of(BASELINE), method):
        if each.tuned is None:
            return f"every trial of {each.method} broke off in the tuning"
        if broken := each.broke_off():
            return f"{plural(broken, 'training')} of {len(each.trainings)} of {each.method} broke off"
    return "nothing was measured"


def _reservations(record: ComparisonRecord, method: MethodRecord) -> str:
    """What weakens the sentence."""
    found = []
    for each in (record.of(BASELINE), method):
        if each.tuned is not None and not each.tuned.inside:
            found.append(f"the best learning rate of {each.method} lies at the end of its grid, so it is not tuned")
        if each.loss is not None and math.isfinite(record.base_test) and each.loss > record.base_test:
            found.append(f"{each.method} ends above the base model")
    if len(record.seeds) < 4:
        found.append(f"{len(record.seeds)} seeds are few")
    return f" But {'; '.join(found)}." if found else ""
