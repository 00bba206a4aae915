"""The learning curves of a search: who continued, who was stopped where, and what became of the best."""

import math
from typing import TYPE_CHECKING, Any

from olora_ray.common.text import plural
from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 500  # of a curve: a picture has not more places
_ENDS = {"finished": "", "stopped": "o", "failed": "x", "unfinished": "|"}
"""The mark at the end of a curve."""


def curves(record: SearchRecord) -> "Figure":
    """The metric over the steps, one line per trial; the best bold, stopped ones fade to a mark."""
    best, default = record.best(), record.of(record.default)
    drawn = [trial for trial in record.trials if _points(trial)]
    low, high = _range(record, drawn) if drawn else (0.0, 0.0)
    outside = sum(any(not low <= value <= high for _, value in _points(trial)) for trial in drawn)
    subtitle = f"one line per trial, the darker the better{style.named(best)}"
    if outside:
        subtitle += f"; far worse than the rest, and so in part outside of the picture: {plural(outside, 'trial')}"
    figure, axes = style.empty("Learning curves", subtitle, width=12.0, height=4.8)
    if not drawn:
        style.say(axes, style.NOTHING)
        return figure
    metric = style.metric_scale(record)
    thin = 2.0 if len(drawn) <= 40 else 0.8
    for trial in drawn:
        if trial is not best:
            colour, width, dash = _look(trial, trial is default)
            place = metric.position(trial.value) if colour == style.GOOD else None
            _curve(axes, trial, colour if place is None else style.shade(record, place), min(width, thin), dash)
    if best in drawn and best is not None:
        _curve(axes, best, style.BEST, 3.2, "-")
    style.label(axes, "step", style.metric_name(record))
    axes.grid(axis="y", color=style.GRID, linewidth=0.8)
    if high > low:
        room = 0.06 * (high - low)
        axes.set_ylim(low - room, high + room)
    style.legend(axes, _handles(drawn, best, default))
    return figure


def _points(trial: TrialRecord) -> list[tuple[int, float]]:
    """The curve, without values that are none; of a long one evenly some, and the last."""
    points = [(step, value) for step, value in trial.curve if math.isfinite(value)]
    return points[:: -(-len(points) // _MOST_POINTS)] + points[-1:] if len(points) > _MOST_POINTS else points


def _look(trial: TrialRecord, default: bool) -> tuple[str, float, Any]:
    """(colour, width, dash) of a trial that is not the best."""
    if default:
        return style.INK, 2.0, (0, (5, 2))
    if trial.status == "failed":
        return style.FAILED, 1.4, "-"
    return (style.GOOD, 1.5, "-") if trial.status == "finished" else (style.FADED, 1.3, (0, (3, 2)))


def _curve(axes: "Axes", trial: TrialRecord, colour: Any, width: float, dash: Any) -> None:
    points = _points(trial)
    steps, values = [step for step, _ in points], [value for _, value in points]
    # A line through one point shows nothing.
    marker = "." if len(points) == 1 else ""
    front = 5 if colour == style.BEST else 4 if colour in (style.INK, style.FAILED) else 3
    axes.plot(steps, values, marker=marker, linestyle=dash, color=colour, linewidth=width, zorder=front)
    if end := _ENDS[trial.status]:
        face = "white" if end == "o" else colour
        axes.plot(
            steps[-1],
            values[-1],
            end,
            color=colour,
            markerfacecolor=face,
            markersize=7,
            markeredgewidth=1.8,
            zorder=front,
        )


def _range(record: SearchRecord, drawn: list[TrialRecord]) -> tuple[float, float]:
    """(low, high) of the values to draw: a trial that diverged leaves the picture, for it would flatten all others.

    The bad end is at most three times as far from the best value as three quarters of the trials ever were.
    """
    sign = 1 if record.mode == "min" else -1
    losses = [[sign * value for _, value in _points(trial)] for trial in drawn]
    best = min(min(values) for values in losses)
    worst = sorted(max(values) for values in losses)
    fence = best + 3 * (worst[(3 * (len(worst) - 1)) // 4] - best)
    inside = max(value for values in losses for value in values if value <= fence)
    return (best, inside) if record.mode == "min" else (-inside, -best)


def _handles(drawn: list[TrialRecord], best: TrialRecord | None, default: TrialRecord | None) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    if best in drawn and best is not None:
        also = ", the default config" if best is default else ""
        handles.append(Line2D([], [], color=style.BEST, linewidth=3.2, label=f"trial {best.number}, the best{also}"))
    if default in drawn and default is not None and default is not best:
        name = f"trial {default.number}, the default config"
        handles.append(Line2D([], [], color=style.INK, linewidth=2.0, linestyle=(0, (5, 2)), label=name))
    named = {trial.number for trial in (best, default) if trial is not None}
    for status, mark in _ENDS.items():
        some = [trial for trial in drawn if trial.status == status and trial.number not in named]
        if some:
            colour, width, dash = _look(some[0], False)
            line = Line2D([], [], color=colour, linewidth=width, linestyle=dash, label=f"{status} ({len(some)})")
            line.set(marker=mark, markerfacecolor="white" if mark == "o" else colour, markeredgewidth=1.8)
            handles.append(line)
    return handles
