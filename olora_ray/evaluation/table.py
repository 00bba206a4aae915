"""Results as lines for a terminal."""

from collections.abc import Mapping, Sequence

from olora_ray.common.text import aligned
from olora_ray.evaluation.bootstrap import Interval
from olora_ray.evaluation.results import Evaluation


def lines(results: Sequence[Evaluation], intervals: Mapping[str, Interval]) -> list[str]:
    """One model: value and standard error; two: both values, and the difference with its interval."""
    if len(results) == 1:
        return _one(results[0])
    first, second = results
    table: list[tuple[str, ...]] = [("metric", "rows", "first", "second", "first - second", "95% interval")]
    ours, theirs = first.metrics(), second.metrics()
    for name in ours | theirs:
        found = intervals.get(name)
        interval = f"[{found.low:+.4f}, {found.high:+.4f}]" if found else "not paired"
        values = (f"{each[name]:.4f}" if name in each else "-" for each in (ours, theirs))
        change = f"{ours[name] - theirs[name]:+.4f}" if name in ours and name in theirs else "-"
        table.append((name, _rows(first if name in ours else second, name), *values, change, interval))
    return [f"first:  {first.target.name}", f"second: {second.target.name}", "", *_columns(table)]


def _one(result: Evaluation) -> list[str]:
    table = [("metric", "rows", "value", "stderr")]
    errors = result.errors()
    for name, value in result.metrics().items():
        error = f"{errors[name]:.4f}" if name in errors else ""
        table.append((name, _rows(result, name), f"{value:.4f}", error))
    return [f"model: {result.target.name}", "", *_columns(table)]


def _rows(result: Evaluation, metric: str) -> str:
    task = metric.partition("/")[0]
    if task in result.tasks:
        return result.tasks[task].rows
    assert result.held_out is not None
    return f"held-out[:{len(result.held_out.column(metric).rows)}]"


def _columns(table: Sequence[tuple[str, ...]]) -> list[str]:
    shown = aligned(table, right=[number > 1 for number in range(len(table[0]))])
    return [shown[0], "-" * len(shown[0]), *shown[1:]]
