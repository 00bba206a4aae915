"""The figures of a search: parallel coordinates, learning curves, learning rate.

All are functions of a SearchRecord. They also work for unusual searches: one trial, no successful trial, equal values,
or a field that is a number in one trial and a text in another. `render` gives them the style of all reports.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from olora_ray.common.text import plural
from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Only the best trial has the colour BEST, in figures and on pages.
BEST, INK, MUTED, GRID, FAILED = "#d55e00", "#1f2933", "#5f6c7b", "#e4e7eb", "#8c2d72"
# Okabe and Ito's palette without BEST. Colour-blind people can tell these colours apart.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e0a100", "#56b4e9", "#4d4d4d")
NOTHING = "no trial has a value"
_MISSING = float("nan")  # stands for a field that a trial does not have

Draw = Callable[[], "Figure"]


def render(draws: Mapping[str, Draw]) -> dict[str, bytes]:
    """Return PNGs by the names of their figures, drawn in the style of the reports."""
    import matplotlib

    style: Any = {
        "text.parse_math": False,  # a `$` in a name must not start a formula
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "savefig.dpi": 150,
        "font.size": 9,
        "legend.frameon": False,
    }
    pictures = {}
    with matplotlib.rc_context(style):
        for name, draw in draws.items():
            draw().savefig(buffer := io.BytesIO(), format="png")
            pictures[name] = buffer.getvalue()
    return pictures


def new(
    title: str, caption: str, width: float = 6.8, height: float = 4.4
) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=13, weight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", size=9, color=MUTED)
    return figure, figure.add_subplot()


def say(axes: "Axes", sentence: str) -> None:
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", size=12, color=MUTED
    )


def legend(axes: "Axes", title: str = "") -> None:
    # To the right of the axes, where it hides no line.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            title=title or None, loc="upper left", bbox_to_anchor=(1.01, 1.0), alignment="left"
        )


def parallel(record: SearchRecord) -> "Figure":
    best, default = record.best(), record.of(record.default)
    low, high, beyond = _metric_range(record)
    caption = f"one line per trial, darker for better trials ({_better(record)}); dashed: the default config"
    figure, axes = new(
        f"Parameters and {_metric(record)}",
        caption + _orange(best) + beyond,
        width=12.0,
        height=4.8,
    )
    if not record.trials:
        say(axes, NOTHING)
        return figure
    fields = _fields(record)
    columns = [
        _positions([trial.params.get(name, _MISSING) for trial in record.trials]) for name in fields
    ]
    values = [_clipped(trial, low, high) for trial in record.trials]
    columns.append(_positions(values))
    for trial, *places in zip(record.trials, *(places for places, _ in columns), strict=True):
        look: dict[str, Any] = {
            "color": _shade(record, trial, low, high),
            "linewidth": 1.3,
            "zorder": 2,
        }
        if trial is best:
            look = {"color": BEST, "linewidth": 3.2, "zorder": 4}
        elif trial is default:
            look = {"color": INK, "linewidth": 1.8, "zorder": 3, "linestyle": "--"}
        axes.plot(range(len(places)), places, **look)
    names = [
        *(text.value(name, 22) for name in text.short(fields).values()),
        text.value(record.metric, 22),
    ]
    # A bold letter is 0.68 of its size wide, and the axis is 11.5 inches long.
    size = min(10.0, 72 * 11.5 / len(names) / (0.68 * max(map(len, names))))
    axes.set_xticks(range(len(names)), names, weight="bold", size=size)
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set(xlim=(-0.25, len(names) - 0.5), ylim=(-0.05, 1.05), yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for number, (_, ticks) in enumerate(columns):
        axes.vlines(number, 0, 1, color=MUTED, linewidth=1)
        for position, shown in ticks:
            axes.text(
                number + 0.015 * len(names), position, shown, va="center", bbox=behind, zorder=5
            )
    return figure


def curves(record: SearchRecord) -> "Figure":
    best, default = record.best(), record.of(record.default)
    drawn = {trial.number: points for trial in record.trials if (points := _points(trial))}
    low, high, beyond = _range(
        record, [[value for _, value in points] for points in drawn.values()]
    )
    caption = f"one line per trial, darker for better trials{_orange(best)}{beyond}"
    figure, axes = new("Learning curves", caption, width=12.0, height=4.8)
    if not drawn:
        say(axes, NOTHING)
        return figure
    lowest, highest, _ = _metric_range(record)
    marks = {"finished": "", "stopped": "o", "failed": "x", "unfinished": "|"}
    counts = {status: sum(trial.status == status and trial.number in drawn for trial in record.trials)
              for status in marks}  # fmt: skip
    for trial in sorted(record.trials, key=lambda trial: (trial is best, trial is default)):
        if trial.number not in drawn:
            continue
        colour, width = _shade(record, trial, lowest, highest), 1.3
        named = f"{trial.status} ({counts.pop(trial.status)})" if trial.status in counts else ""
        if trial is default:
            colour, width, named = INK, 1.8, f"trial {trial.number}, the default config"
        if trial is best:
            also = ", the default config" if trial is default else ""
            colour, width, named = BEST, 3.2, f"trial {trial.number}, the best{also}"
        steps, values = zip(*drawn[trial.number], strict=True)
        # A line through a single point is invisible.
        mark = marks[trial.status] or ("." if len(steps) == 1 else "")
        axes.plot(steps, values, color=colour, linewidth=width, linestyle="--" if trial is default else "-",
                  marker=mark, markevery=[-1], label=named or None)  # fmt: skip
    axes.set(xlabel="step", ylabel=f"{_metric(record)} ({_better(record)})")
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.grid(axis="y")
    legend(axes)
    return figure


def rate(record: SearchRecord) -> "Figure":
    """Draw the learning rate against the metric, by rank. Without these fields: the first two, a number first."""
    field, group = _rate_fields(record)
    best = record.best()
    low, high, beyond = _metric_range(record)
    names = text.short(record.fields)
    by = f" by {text.value(names[group], 22)}" if group else ""
    shown = (
        {"train.lr": "Learning rate"}.get(field, text.value(names[field], 22))
        if field
        else "A field"
    )
    figure, axes = new(
        f"{shown} and {_metric(record)}{by}",
        f"hollow: stopped early{_orange(best)}{beyond}",
        12.0,
        4.8,
    )
    if field is None or best is None:
        say(axes, NOTHING if field else "no field is searched")
        return figure
    trials = record.ranked()
    across, ticks = _positions([trial.params.get(field, _MISSING) for trial in trials])
    groups = [text.value(trial.params.get(group, "")) if group else "" for trial in trials]
    values = sorted(dict.fromkeys(groups), key=lambda value: (len(value), value))
    for number, value in enumerate(values):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            [],
            [],
            "o",
            color=colour,
            label=text.value(value, 18) if group and number < 12 else None,
        )
        for trial, position, own in zip(trials, across, groups, strict=True):
            if own == value:
                face = colour if trial.status == "finished" else "white"
                axes.plot(
                    position,
                    _clipped(trial, low, high),
                    "o",
                    color=colour,
                    markerfacecolor=face,
                    markersize=8,
                )
    axes.plot(across[0], _clipped(best, low, high), "o", markersize=17, markerfacecolor="none", markeredgecolor=BEST,
              markeredgewidth=2.4)  # fmt: skip
    default = record.of(record.default)
    if default in trials and default is not None:
        at = (across[trials.index(default)], _clipped(default, low, high))
        if math.isfinite(at[0]):
            axes.annotate(
                "default", at, (11, 0), textcoords="offset points", va="center", color=MUTED
            )
    axes.set_xticks([position for position, _ in ticks], [shown for _, shown in ticks])
    axes.set(
        xlim=(-0.06, 1.06),
        xlabel=text.value(field, 60),
        ylabel=f"{_metric(record)} ({_better(record)})",
    )
    axes.grid()
    legend(axes, text.value(names[group], 22) if group else "")
    return figure


# File name without its ending -> the function that draws it, in the order of the page.
FIGURES: dict[str, Callable[[SearchRecord], "Figure"]] = {
    "parallel_coordinates": parallel,
    "learning_curves": curves,
    "learning_rate": rate,
}


def _positions(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the positions of values on an axis from 0 to 1 (NaN for NaN and infinity), and the ticks of the axis.

    Numbers that differ by a factor of 8 or more get a logarithmic axis; mixed types become categories.
    """
    known = [
        value for value in values if not (isinstance(value, float) and not math.isfinite(value))
    ]
    if known and all(text.is_number(value) for value in known):
        logarithmic = min(known) > 0 and max(known) >= 8 * min(known)
        to, back = (math.log, math.exp) if logarithmic else (float, float)
        low, high = to(min(known)), to(max(known))
        low, width = (low, high - low) if high > low else (low - 0.5, 1.0)
        positions = [min(1.0, max(0.0, (to(value) - low) / width)) if text.is_number(value) else math.nan
                  for value in values]  # fmt: skip
        distinct = sorted({float(value) for value in known})
        shown = (
            distinct if len(distinct) <= 5 else [back(low + width * part / 4) for part in range(5)]
        )
        ticks = [
            ((to(value) - low) / width, label)
            for value, label in zip(shown, text.numbers(shown, 3), strict=True)
        ]
    else:
        names = list(dict.fromkeys(map(text.value, known)))
        at = {
            name: number / (len(names) - 1) if len(names) > 1 else 0.5
            for number, name in enumerate(names)
        }
        positions = [at.get(text.value(value), math.nan) for value in values]
        ticks = [(position, text.value(name, 16)) for name, position in at.items()]
    apart: list[tuple[float, str]] = []
    for tick in ticks:
        if not apart or tick[0] - apart[-1][0] >= 0.07:  # nearer labels would overlap
            apart.append(tick)
    return positions, apart


def _range(record: SearchRecord, values: Sequence[Sequence[float]]) -> tuple[float, float, str]:
    """Return (low, high) of the values to draw, given per trial, and a sentence about trials beyond."""
    # A diverged trial would flatten all others. So the bad end is at most three times as far from the better three
    # quarters of the trials as these are from the best value.
    if not values:
        return 0.0, 0.0, ""
    sign = 1 if record.mode == "min" else -1
    losses = [[sign * value for value in each] for each in values]
    worst = sorted(max(each) for each in losses)
    best, quarter = min(map(min, losses)), worst[3 * (len(worst) - 1) // 4]
    # Without a spread, nothing is an outlier.
    fence = quarter + 3 * (quarter - best) if quarter > best else worst[-1]
    bad = max(loss for each in losses for loss in each if loss <= fence)
    beyond = sum(each > bad for each in worst)
    said = f"; far worse, drawn at the edge or outside: {plural(beyond, 'trial')}" if beyond else ""
    return (best, bad, said) if record.mode == "min" else (-bad, -best, said)


def _metric_range(record: SearchRecord) -> tuple[float, float, str]:
    return _range(record, [[trial.value or 0.0] for trial in record.ranked()])


def _clipped(trial: TrialRecord, low: float, high: float) -> float:
    return (
        min(high, max(low, trial.value))
        if trial.measured() and trial.value is not None
        else math.nan
    )


def _points(trial: TrialRecord) -> list[tuple[int, float]]:
    """Return the finite points of the curve; of a long curve about 500, evenly, and the last."""
    points = [(step, value) for step, value in trial.curve if math.isfinite(value)]
    return [*points[: -1 : 1 + len(points) // 500], *points[-1:]]


def _rate_fields(record: SearchRecord) -> tuple[str | None, str | None]:
    fields = _fields(record)
    numeric = [name for name in fields if text.numeric(record, name)]
    field = next((name for name in ("train.lr", *numeric, *fields) if name in fields), None)
    return field, next(
        (name for name in ("adapter.rank", *fields) if name in fields and name != field), None
    )


def _fields(record: SearchRecord) -> list[str]:
    return [name for name in record.fields if any(name in trial.params for trial in record.trials)]


def _shade(record: SearchRecord, trial: TrialRecord, low: float, high: float) -> Any:
    # One hue from dark (good) to light (bad): the order shows even to those who cannot tell colours apart.
    import matplotlib

    if trial.status == "failed" or not trial.measured():
        return FAILED
    position = (_clipped(trial, low, high) - low) / (high - low) if high > low else 0.0
    return matplotlib.colormaps["Blues"](
        0.95 - 0.65 * (position if record.mode == "min" else 1 - position)
    )


def _metric(record: SearchRecord) -> str:
    return text.value(record.metric, 26)


def _better(record: SearchRecord) -> str:
    return f"{'lower' if record.mode == 'min' else 'higher'} is better"


def _orange(best: TrialRecord | None) -> str:
    return f"; orange: trial {best.number}, the best" if best else ""
