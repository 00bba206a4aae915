"""A search in words: readable values, the ranked trials as a table, and the outcome in sentences."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import pstdev
from typing import Any

from olora_ray.common.text import aligned, duration
from olora_ray.sweep.record import SearchRecord, TrialRecord, finite


def number(value: float, digits: int = 4, scientific: bool = False) -> str:
    """Return a number with at most `digits` significant digits, without padding: 0.25, 3e-4, 1.5e+6."""
    size = abs(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if scientific or not 1e-3 <= size < 1e6:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent):+d}"
    if size >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def numbers(values: Sequence[float], digits: int = 4) -> list[str]:
    """Return the numbers as texts, with as many digits as tell different values apart."""
    # One notation for all: 5e-4, 1e-3, 2e-3.
    small = any(0 < abs(value) < 1e-3 for value in values)
    texts: list[str] = []
    for more in range(digits, 18):
        texts = [number(value, more, scientific=small and abs(value) < 0.1) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def value(item: Any, longest: int | None = None) -> str:
    """Return a config value as in YAML, cut to `longest` characters."""
    if item is None:
        shown = "null"
    elif isinstance(item, bool):
        shown = str(item).lower()
    elif isinstance(item, float):
        shown = number(item)
    elif isinstance(item, list | tuple):
        shown = ", ".join(value(part) for part in item)
    else:
        shown = " ".join(str(item).split())
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown


def steps(done: int, total: int) -> str:
    """Return the steps of a trial: 14, or 7 of 14 if it ended early."""
    if done < total:
        return f"{done} of {total}"
    return str(done)


def params(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value(item)}" for name, item in values.items())


def is_number(item: Any) -> bool:
    """True for a finite number; true and false are not numbers here."""
    return isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)


def numeric(record: SearchRecord, field: str) -> bool:
    return all(is_number(trial.params.get(field, 0)) for trial in record.trials)


def short(fields: Sequence[str]) -> dict[str, str]:
    """Return field -> its last part, or the full name if two fields share the last part."""
    names = {name: name.rsplit(".", 1)[-1] for name in fields}
    counts = Counter(names.values())
    for name, end in names.items():
        if counts[end] > 1:
            names[name] = name
    return names


def lines(record: SearchRecord, top: int = 10) -> list[str]:
    """Return the `top` best trials as aligned columns, then trials without a value if there is room."""
    names = [value(name, 24) for name in short(record.fields).values()]
    head = ["", "trial", *names, value(record.metric, 24), "steps", "time", "status", ""]
    rows = [head]
    ordered = record.ordered()
    for rank, trial in enumerate(ordered[:top], 1):
        place = f"{rank}." if trial.measured() else ""
        rows.append([place, *cells(record, trial, longest=24)])
    numbered = [numeric(record, name) for name in record.fields]
    shown = aligned(rows, [True, True, *numbered, True, True, True, False, False])
    if len(ordered) > top:
        shown.append(f"... and {len(ordered) - top} more")
    return shown


def cells(record: SearchRecord, trial: TrialRecord, longest: int | None = None) -> list[str]:
    """Return number, params, value, steps, time, status and reason of a trial, with texts of `longest` characters."""
    if trial.value is None:
        measured = "-"
    elif 1e-2 <= abs(trial.value) < 1e4:
        measured = f"{trial.value:.4f}"
    else:
        measured = number(trial.value)
    status: str = trial.status
    if trial.number == record.default:
        status += " (default)"
    return [
        str(trial.number),
        *(value(trial.params.get(name, ""), longest) for name in record.fields),
        measured,
        steps(trial.step, trial.total),
        duration(trial.seconds),
        status,
        value(trial.reason, longest and 2 * longest),
    ]


def summary(record: SearchRecord) -> list[str]:
    return aligned([[f"{name}:", sentence] for name, sentence in facts(record)], [False, False])


def facts(record: SearchRecord) -> list[tuple[str, str]]:
    best = record.best()
    outcome = f"no trial has a value of {record.metric}"
    if best is not None and best.value is not None:
        outcome = (
            f"{record.metric} {number(best.value)} (trial {best.number}{_cut(best)}):"
            f" {params(best.params)}"
        )
    counts: Counter[str] = Counter(trial.status for trial in record.trials)
    statuses = ("finished", "stopped", "failed", "unfinished")
    ends = ", ".join(f"{counts[status]} {status}" for status in statuses if counts[status])
    trials = f"{len(record.trials)} in {duration(record.seconds)}"
    if ends:
        trials += f": {ends}"
    all_facts = [
        ("best", outcome),
        ("default", against_default(record)),
        ("spread", spread(record)),
        ("trials", trials),
        *(("note", note) for note in record.notes),
    ]
    return [(name, sentence) for name, sentence in all_facts if sentence]


def verdict(record: SearchRecord) -> str:
    """Return what the search has found, and whether it is better than the unchanged config."""
    found = dict(facts(record))
    return ". ".join(found[name] for name in ("best", "default") if name in found)


def against_default(record: SearchRecord) -> str:
    best = record.best()
    default = record.unchanged()
    if best is None:
        return ""
    if default is None:
        return (
            "the unchanged config was not tried, so the best trial has nothing to be compared with"
        )
    because = f": {value(default.reason, 100)}" if default.reason else ""
    if not default.measured() or default.value is None or best.value is None:
        return (
            f"the unchanged config (trial {default.number}, {default.status}) has no value{because}"
        )
    if default.number == best.number:
        return f"no other trial was better than the unchanged config (trial {default.number})"
    other = f"the unchanged config: {number(default.value)} (trial {default.number}{_cut(default)})"
    gain = (default.value - best.value) * record.sign()
    if gain < 0:  # a failed trial is ranked last, even if its value is better
        return f"the best is not as good as {other}{because}"
    if not gain:
        return f"no better than {other}"
    relative = f" ({gain / abs(default.value):.1%})" if default.value else ""
    return f"the best is {number(gain)}{relative} better than {other}"


def spread(record: SearchRecord) -> str:
    ranked = record.ranked()
    # Only finished trials: a stopped one is also behind because it had fewer steps.
    top = ([trial for trial in ranked if trial.status == "finished"] or ranked)[:5]
    values = [trial.value for trial in top if trial.value is not None]
    others = len(values) - 1
    if others < 1:
        return ""
    # Another seed moves a loss by about 0.5%. So values that near to the best count as equally good.
    near = sum(abs(value - values[0]) <= 0.005 * abs(values[0]) for value in values[1:])
    some = str(near)
    if not near:
        some = "none"
    elif near == others:
        some = "all"
    low, high = numbers([min(values), max(values)])
    return (
        f"{low} .. {high} over the top {len(values)}, standard deviation {number(pstdev(values), 2)}; {some} of the"
        f" other {others} within 0.5% of the best (another seed can change a value by as much)"
    )


def table(record: SearchRecord) -> tuple[list[str], list[list[Any]]]:
    """Return (columns, rows) of plain values for a table artifact, the best trial first; NaN becomes None."""
    fields = record.fields
    columns = [
        "trial",
        "status",
        record.metric,
        *fields,
        "steps",
        "seconds",
        "reason",
        "mlflow_run",
    ]
    rows = [
        [
            trial.number,
            trial.status,
            _plain(trial.value),
            *(_plain(trial.params.get(name)) for name in fields),
            trial.step,
            round(trial.seconds, 1),
            trial.reason,
            trial.mlflow_run,
        ]
        for trial in record.ordered()
    ]
    return columns, rows


def _cut(trial: TrialRecord) -> str:
    if trial.status == "finished":
        return ""
    return f", {trial.status} at step {steps(trial.step, trial.total)}"


def _plain(item: Any) -> Any:
    if isinstance(item, int | float | str | None):
        return finite(item)
    return value(item)
