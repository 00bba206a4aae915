"""The figures of a search: parallel coordinates, learning curves, learning rate.

All are functions of a SearchRecord. They also work for unusual searches: one trial, no successful trial, equal values,
or a field that is a number in one trial and a text in another. `render` gives them the style of all reports.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from olora_ray.common.text import plural
from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Only the best trial has the colour BEST, in figures and on pages.
BEST = "#d55e00"
INK = "#1f2933"
MUTED = "#5f6c7b"
GRID = "#e4e7eb"
FAILED = "#8c2d72"
# Okabe and Ito's palette without BEST. Colour-blind people can tell these colours apart.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e0a100", "#56b4e9", "#4d4d4d")
NOTHING = "no trial has a value"

# Positions of values on an axis from 0 to 1, and (position, text) of the ticks of the axis.
_Axis = tuple[list[float], list[tuple[float, str]]]

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
            buffer = io.BytesIO()
            draw().savefig(buffer, format="png")
            pictures[name] = buffer.getvalue()
    return pictures


def new(title: str, caption: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.8), layout="constrained")
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
    best = record.best()
    default = record.unchanged()
    low, high, beyond = _metric_range(record)
    caption = f"one line per trial, darker for better trials ({_better(record)}); dashed: the default config"
    figure, axes = new(f"Parameters and {_metric(record)}", caption + _orange(best) + beyond)
    if not record.trials:
        say(axes, NOTHING)
        return figure
    fields = _fields(record)
    columns = [_axis_of(record.trials, name) for name in fields]
    columns.append(_axis([_clipped(trial, low, high) for trial in record.trials]))
    for number, trial in enumerate(record.trials):
        places = [positions[number] for positions, _ in columns]
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
    names = [text.value(name, 22) for name in (*text.short(fields).values(), record.metric)]
    # A bold letter is 0.68 of its size wide, and the axis is 11.5 inches long.
    size = min(10.0, 72 * 11.5 / len(names) / (0.68 * max(map(len, names))))
    axes.set_xticks(range(len(names)), names, weight="bold", size=size)
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set(xlim=(-0.25, len(names) - 0.5), ylim=(-0.05, 1.05), yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for number, (_, ticks) in enumerate(columns):
        axes.vlines(number, 0, 1, color=MUTED, linewidth=1)
        right = number + 0.015 * len(names)
        for position, shown in ticks:
            axes.text(right, position, shown, va="center", bbox=behind, zorder=5)
    return figure


def curves(record: SearchRecord) -> "Figure":
    best = record.best()
    default = record.unchanged()
    drawn = {}
    for trial in record.trials:
        points = _points(trial)
        if points:
            drawn[trial.number] = tuple(zip(*points, strict=True))
    low, high, beyond = _range(record, [values for _, values in drawn.values()])
    caption = f"one line per trial, darker for better trials{_orange(best)}{beyond}"
    figure, axes = new("Learning curves", caption)
    if not drawn:
        say(axes, NOTHING)
        return figure
    lowest, highest, _ = _metric_range(record)
    marks = {"finished": "", "stopped": "o", "failed": "x", "unfinished": "|"}
    counts = Counter(trial.status for trial in record.trials if trial.number in drawn)
    for trial in sorted(record.trials, key=lambda trial: (trial is best, trial is default)):
        if trial.number not in drawn:
            continue
        colour = _shade(record, trial, lowest, highest)
        width = 1.3
        style = "-"
        label = ""
        if trial.status in counts:  # the first of its status has the entry in the legend
            label = f"{trial.status} ({counts.pop(trial.status)})"
        if trial is default:
            colour = INK
            width = 1.8
            style = "--"
            label = f"trial {trial.number}, the default config"
        if trial is best:
            colour = BEST
            width = 3.2
            label = f"trial {trial.number}, the best"
            if trial is default:
                label += ", the default config"
        steps, values = drawn[trial.number]
        mark = marks[trial.status]
        if not mark and len(steps) == 1:  # a line through a single point is invisible
            mark = "."
        axes.plot(steps, values, color=colour, linewidth=width, linestyle=style, marker=mark, markevery=[-1],
                  label=label)  # fmt: skip
    axes.set(xlabel="step", ylabel=_label(record))
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
    names = {name: text.value(end, 22) for name, end in text.short(record.fields).items()}
    title = f"{names.get(field, 'A field')} and {_metric(record)}"
    if field == "train.lr":
        title = f"Learning rate and {_metric(record)}"
    if group:
        title += f" by {names[group]}"
    figure, axes = new(title, f"hollow: stopped early{_orange(best)}{beyond}")
    if not field or best is None:
        say(axes, NOTHING if field else "no field is searched")
        return figure
    trials = record.ranked()
    across, ticks = _axis_of(trials, field)
    groups = [text.value(trial.params.get(group, "")) for trial in trials]
    values = sorted(dict.fromkeys(groups), key=lambda value: (len(value), value))
    for number, value in enumerate(values):
        colour = COLOURS[number % len(COLOURS)]
        label = text.value(value, 18) if number < 12 else ""
        axes.plot([], [], "o", color=colour, label=label)
        for trial, position, own in zip(trials, across, groups, strict=True):
            if own == value:
                face = colour if trial.status == "finished" else "white"
                height = _clipped(trial, low, high)
                axes.plot(position, height, "o", color=colour, markerfacecolor=face, markersize=8)
    axes.plot(across[0], _clipped(best, low, high), "o", markersize=17, markerfacecolor="none", markeredgecolor=BEST,
              markeredgewidth=2.4)  # fmt: skip
    default = record.unchanged()
    if default is not None and default in trials:
        position = across[trials.index(default)]
        if math.isfinite(position):
            at = (position, _clipped(default, low, high))
            axes.annotate(
                "default", at, (11, 0), textcoords="offset points", va="center", color=MUTED
            )
    axes.set_xticks([position for position, _ in ticks], [shown for _, shown in ticks])
    axes.set(
        xlim=(-0.06, 1.06),
        xlabel=text.value(field, 60),
        ylabel=_label(record),
    )
    axes.grid()
    legend(axes, names.get(group, ""))
    return figure


# File name without its ending -> the function that draws it, in the order of the page.
FIGURES: dict[str, Callable[[SearchRecord], "Figure"]] = {
    "parallel_coordinates": parallel,
    "learning_curves": curves,
    "learning_rate": rate,
}


def _axis_of(trials: Sequence[TrialRecord], field: str) -> _Axis:
    return _axis([trial.params.get(field, math.nan) for trial in trials])


def _axis(values: Sequence[Any]) -> _Axis:
    """Place values on an axis from 0 to 1; the positions of NaN and infinity are NaN.

    Numbers that differ by a factor of 8 or more get a logarithmic axis; mixed types become categories.
    """
    known = [value for value in values if not isinstance(value, float) or math.isfinite(value)]
    if known and all(text.is_number(value) for value in known):
        to: Callable[[float], float] = float
        back: Callable[[float], float] = float
        if min(known) > 0 and max(known) >= 8 * min(known):
            to = math.log
            back = math.exp
        low = to(min(known))
        width = to(max(known)) - low
        if not width:
            low -= 0.5
            width = 1.0
        positions = [math.nan] * len(values)
        for number, value in enumerate(values):
            if text.is_number(value):
                positions[number] = min(1.0, max(0.0, (to(value) - low) / width))
        shown = sorted({float(value) for value in known})
        if len(shown) > 5:
            shown = [back(low + width * part / 4) for part in range(5)]
        labels = text.numbers(shown, 3)
        places = [(to(value) - low) / width for value in shown]
    else:
        names = list(dict.fromkeys(map(text.value, known)))
        labels = [text.value(name, 16) for name in names]
        places = [number / max(1, len(names) - 1) for number in range(len(names))]
        if len(names) == 1:
            places = [0.5]
        at = dict(zip(names, places, strict=True))
        positions = [at.get(text.value(value), math.nan) for value in values]
    apart: list[tuple[float, str]] = []
    for position, label in zip(places, labels, strict=True):
        if not apart or position - apart[-1][0] >= 0.07:  # nearer labels would overlap
            apart.append((position, label))
    return positions, apart


def _range(record: SearchRecord, values: Sequence[Sequence[float]]) -> tuple[float, float, str]:
    """Return (low, high) of the values to draw, given per trial, and a sentence about trials beyond."""
    # A diverged trial would flatten all others. So the bad end is at most three times as far from the better three
    # quarters of the trials as these are from the best value.
    if not values:
        return 0.0, 0.0, ""
    losses: list[float] = []
    worst: list[float] = []
    for each in values:
        own = [record.sign() * value for value in each]
        losses += own
        worst.append(max(own))
    worst.sort()
    best = min(losses)
    quarter = worst[3 * (len(worst) - 1) // 4]
    fence = worst[-1]  # without a spread, nothing is an outlier
    if quarter > best:
        fence = quarter + 3 * (quarter - best)
    bad = max(loss for loss in losses if loss <= fence)
    beyond = sum(each > bad for each in worst)
    said = f"; far worse, drawn at the edge or outside: {plural(beyond, 'trial')}" if beyond else ""
    if record.mode == "max":
        return -bad, -best, said
    return best, bad, said


def _metric_range(record: SearchRecord) -> tuple[float, float, str]:
    return _range(record, [[trial.value or 0.0] for trial in record.ranked()])


def _clipped(trial: TrialRecord, low: float, high: float) -> float:
    if trial.value is None or not trial.measured():
        return math.nan
    return min(high, max(low, trial.value))


def _points(trial: TrialRecord) -> list[tuple[int, float]]:
    """Return the finite points of the curve; of a long curve about 500, evenly, and the last."""
    points = [(step, value) for step, value in trial.curve if math.isfinite(value)]
    return [*points[: -1 : 1 + len(points) // 500], *points[-1:]]


def _rate_fields(record: SearchRecord) -> tuple[str, str]:
    """Return the fields across and of the groups; each is empty if there is none."""
    fields = _fields(record)
    numeric = [name for name in fields if text.numeric(record, name)]
    field = next((name for name in ("train.lr", *numeric, *fields) if name in fields), "")
    others = [name for name in ("adapter.rank", *fields) if name in fields and name != field]
    return field, next(iter(others), "")


def _fields(record: SearchRecord) -> list[str]:
    return [name for name in record.fields if any(name in trial.params for trial in record.trials)]


def _shade(record: SearchRecord, trial: TrialRecord, low: float, high: float) -> Any:
    # One hue from dark (good) to light (bad): the order shows even to those who cannot tell colours apart.
    import matplotlib

    if trial.status == "failed" or not trial.measured():
        return FAILED
    position = 0.0
    if high > low:
        position = (_clipped(trial, low, high) - low) / (high - low)
    if record.mode == "max":
        position = 1 - position
    return matplotlib.colormaps["Blues"](0.95 - 0.65 * position)


def _metric(record: SearchRecord) -> str:
    return text.value(record.metric, 26)


def _better(record: SearchRecord) -> str:
    return "lower is better" if record.mode == "min" else "higher is better"


def _label(record: SearchRecord) -> str:
    return f"{_metric(record)} ({_better(record)})"


def _orange(best: TrialRecord | None) -> str:
    return f"; orange: trial {best.number}, the best" if best else ""
