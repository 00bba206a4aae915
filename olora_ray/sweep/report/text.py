"""A search in words: readable values, the ranked trials as a table, and the outcome in sentences."""

import math
from collections.abc import Mapping, Sequence
from statistics import pstdev
from typing import Any

from olora_ray.common.text import aligned, duration
from olora_ray.sweep.record import SearchRecord, TrialRecord, finite


def number(value: float, digits: int = 4) -> str:
    """Return a number with at most `digits` significant digits, without padding: 0.25, 3e-4, 1.5e+6."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return _scientific(value, digits)


def _scientific(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{'+' if int(exponent) > 0 else ''}{int(exponent)}"


def numbers(values: Sequence[float], digits: int = 4) -> list[str]:
    """Return the numbers as texts, with as many digits as tell different values apart."""
    # One notation for all: 5e-4, 1e-3, 2e-3.
    small = any(0 < abs(value) < 1e-3 for value in values)
    texts: list[str] = []
    for more in range(digits, 18):
        texts = [
            _scientific(value, more) if small and 0 < abs(value) < 0.1 else number(value, more)
            for value in values
        ]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def value(item: Any, longest: int | None = None) -> str:
    """Return a config value as in YAML, cut to `longest` characters."""
    if isinstance(item, bool) or item is None:
        shown = {True: "true", False: "false", None: "null"}[item]
    elif isinstance(item, int | float):
        shown = str(item) if isinstance(item, int) else number(item)
    elif isinstance(item, list | tuple):
        shown = ", ".join(value(part) for part in item)
    else:
        shown = " ".join(str(item).split())
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def steps(done: int, total: int) -> str:
    """Return the steps of a trial: 14, or 7 of 14 if it ended early."""
    return f"{done} of {total}" if done < total else str(done)


def params(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value(item)}" for name, item in values.items())


def is_number(item: Any) -> bool:
    """True for a finite number; true and false are not numbers here."""
    return isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)


def numeric(record: SearchRecord, field: str) -> bool:
    return all(is_number(trial.params.get(field, 0)) for trial in record.trials)


def short(fields: Sequence[str]) -> dict[str, str]:
    """Return field -> its last part, or the full name if two fields share the last part."""
    last = [name.rsplit(".", 1)[-1] for name in fields]
    return {
        name: end if last.count(end) == 1 else name for name, end in zip(fields, last, strict=True)
    }


def lines(record: SearchRecord, top: int = 10) -> list[str]:
    """Return the `top` best trials as aligned columns, then trials without a value if there is room."""
    names = short(record.fields)
    head = [
        "",
        "trial",
        *(value(name, 24) for name in names.values()),
        value(record.metric, 24),
        "steps",
        "time",
        "status",
        "",
    ]
    ordered = record.ordered()
    rows = [
        [f"{rank}." if trial.measured() else "", *cells(record, trial, longest=24)]
        for rank, trial in enumerate(ordered[:top], 1)
    ]
    right = [True, True, *(numeric(record, name) for name in names), True, True, True, False, False]
    shown = aligned([head, *rows], right)
    if len(ordered) > top:
        shown.append(f"... and {len(ordered) - top} more")
    return shown


def cells(record: SearchRecord, trial: TrialRecord, longest: int | None = None) -> list[str]:
    """Return number, params, value, steps, time, status and reason of a trial, with texts of `longest` characters."""
    mark = " (default)" if trial.number == record.default else ""
    size = 0.0 if trial.value is None else abs(trial.value)
    shown = (
        "-"
        if trial.value is None
        else f"{trial.value:.4f}"
        if 1e-2 <= size < 1e4
        else number(trial.value)
    )
    return [
        str(trial.number),
        *(
            value(trial.params[name], longest) if name in trial.params else ""
            for name in record.fields
        ),
        shown,
        steps(trial.step, trial.total),
        duration(trial.seconds),
        trial.status + mark,
        value(trial.reason, longest and 2 * longest),
    ]


def summary(record: SearchRecord) -> list[str]:
    return aligned([[f"{name}:", sentence] for name, sentence in facts(record)], [False, False])


def facts(record: SearchRecord) -> list[tuple[str, str]]:
    all_facts = [
        ("best", _best(record)),
        ("default", against_default(record)),
        ("spread", spread(record)),
        ("trials", _ends(record)),
        *(("note", note) for note in record.notes),
    ]
    return [(name, sentence) for name, sentence in all_facts if sentence]


def against_default(record: SearchRecord) -> str:
    best, default = record.best(), record.of(record.default)
    if best is None:
        return ""
    if default is None:
        return (
            "the unchanged config was not tried, so the best trial has nothing to be compared with"
        )
    if not default.measured() or default.value is None or best.value is None:
        return f"the unchanged config (trial {default.number}, {default.status}) has no value{_because(default)}"
    if default.number == best.number:
        return f"no other trial was better than the unchanged config (trial {default.number})"
    other = f"the unchanged config: {number(default.value)} (trial {default.number}{_cut(default)})"
    gain = (default.value - best.value) * (1 if record.mode == "min" else -1)
    if gain < 0:  # a failed trial is ranked last, even if its value is better
        return f"the best is not as good as {other}{_because(default)}"
    relative = f" ({gain / abs(default.value):.1%})" if default.value else ""
    return (
        f"the best is {number(gain)}{relative} better than {other}"
        if gain
        else f"no better than {other}"
    )


def spread(record: SearchRecord) -> str:
    ranked = record.ranked()
    # Only finished trials: a stopped one is also behind because it had fewer steps.
    top = ([trial for trial in ranked if trial.status == "finished"] or ranked)[:5]
    values = [trial.value for trial in top if trial.value is not None]
    if len(values) < 2:
        return ""
    # Another seed moves a loss by about 0.5%. So values that near to the best count as equally good.
    near = sum(abs(value - values[0]) <= 0.005 * abs(values[0]) for value in values[1:])
    low, high = numbers([min(values), max(values)])
    far = "within 0.5% of the best (another seed can change a value by as much)"
    return (
        f"{low} .. {high} over the top {len(values)}, standard deviation {number(pstdev(values), 2)};"
        f" {_count(near, len(values) - 1)} of the other {len(values) - 1} {far}"
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


def _best(record: SearchRecord) -> str:
    best = record.best()
    if best is None or best.value is None:
        return f"no trial has a value of {record.metric}"
    return f"{record.metric} {number(best.value)} (trial {best.number}{_cut(best)}): {params(best.params)}"


def _cut(trial: TrialRecord) -> str:
    if trial.status == "finished":
        return ""
    return f", {trial.status} at step {steps(trial.step, trial.total)}"


def _count(some: int, all_: int) -> str:
    return "none" if not some else "all" if some == all_ else str(some)


def _ends(record: SearchRecord) -> str:
    counts = [
        f"{sum(trial.status == status for trial in record.trials)} {status}"
        for status in ("finished", "stopped", "failed", "unfinished")
    ]
    some = ", ".join(count for count in counts if not count.startswith("0 "))
    return f"{len(record.trials)} in {duration(record.seconds)}" + (f": {some}" if some else "")


def _because(trial: TrialRecord) -> str:
    return f": {value(trial.reason, 100)}" if trial.reason else ""


def _plain(item: Any) -> Any:
    return finite(item) if isinstance(item, int | float | str | None) else value(item)
