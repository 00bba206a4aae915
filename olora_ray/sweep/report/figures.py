"""The figures of a search: parallel coordinates, learning rate against loss, learning curves, importances.

All are functions of a SearchRecord, and cope with what a search may be: one trial, none that worked, equal
values, a field that is now a number and now a word.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from olora_ray.common.text import plural
from olora_ray.sweep.record import SearchRecord
from olora_ray.sweep.report import axis as scale
from olora_ray.sweep.report import importance, style, text
from olora_ray.sweep.report.axis import Scale
from olora_ray.sweep.report.learning_curves import curves
from olora_ray.sweep.report.scatter import rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAN = float("nan")  # of a field that a trial does not have


def parallel(record: SearchRecord) -> "Figure":
    """Parallel coordinates: one line per trial through its parameters to its value."""
    trials, best = record.ranked(), record.best()
    fields = [name for name in record.fields if any(name in trial.params for trial in record.trials)]
    failed = [trial for trial in record.trials if not trial.measured()]
    subtitle = f"one line per trial, the darker the better ({style.better(record)}){style.named(best)}"
    if default := record.of(record.default):
        subtitle += "; dashed: the default config" if default is not best else " and the default config"
    if failed:
        subtitle += f"; dotted: {len(failed)} without a value"
    figure, axes = style.empty(
        f"Parameters and the {style.metric(record)} they led to", subtitle, width=12.0, height=4.8
    )
    if not record.trials:
        style.say(axes, style.NOTHING)
        return figure
    names, metric = text.short(fields), style.metric_scale(record)
    scales = [scale.of(trial.params.get(name) for trial in record.trials if name in trial.params) for name in fields]
    if trials:
        _gradient(axes, len(scales), record)
    _vertical_axes(axes, [*scales, metric], [*(text.value(names[name], 26) for name in fields), style.metric(record)])
    thin = (1.6, 0.9) if len(record.trials) <= 40 else (1.0, 0.5)
    drawn = [*failed, *reversed(trials)]
    fanned = [
        _fan([axis.position(trial.params.get(name, _NAN)) for trial in drawn])
        for axis, name in zip(scales, fields, strict=True)
    ]
    for trial, places in zip(drawn, zip(*fanned, strict=True) if fanned else [()] * len(drawn), strict=True):
        place = metric.position(trial.value)
        if place is None:
            _line(axes, places, style.FAILED, 1.2, 0.7, ":")
        elif trial is best:
            _line(axes, [*places, place], "white", 6.0, 1.0)
            _line(axes, [*places, place], style.BEST, 3.2, 1.0)
        elif trial is default:
            _line(axes, [*places, place], style.INK, 1.8, 1.0, "--")
        else:
            _line(axes, [*places, place], style.shade(record, place), *thin)
    return figure


def importances(record: SearchRecord) -> "Figure":
    """How much each field decided, as bars; says so where that cannot be computed."""
    found = importance.of(record)
    figure, axes = style.empty(
        "What mattered",
        f"share of the differences in {style.metric(record)} that a field explains alone (fANOVA,"
        f" {plural(found.trials, 'trial')})",
    )
    if found.why_not:
        style.say(axes, found.why_not)
        return figure
    names = text.short(record.fields)
    shares = [share for _, share in found.shares]
    places = list(range(len(shares)))[::-1]
    axes.barh(places, shares, height=0.55, color=style.GOOD)
    for place, share in zip(places, shares, strict=True):
        axes.annotate(f"{share:.0%}", (share, place), (6, 0), textcoords="offset points", va="center", color=style.INK)
    labels = [style.plain(" with ".join(names[name] for name in group)) for group, _ in found.shares]
    axes.set_yticks(places, labels)
    middle, half = (len(shares) - 1) / 2, max(len(shares), 4) / 2
    axes.set_ylim(middle - half, middle + half)
    axes.set_xlim(0, max(shares) * 1.12)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    return figure


def _vertical_axes(axes: "Axes", scales: Sequence[Scale], names: Sequence[str]) -> None:
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    axes.set_xlim(-0.25, len(scales) - 0.55)
    axes.set_ylim(-0.06, 1.06)
    # As large as fits beside its neighbours: a bold letter is 0.68 of its size wide, the picture 11.5 inches.
    size = 72 * 11.5 / len(names) / (0.68 * max(len(name) for name in names))
    axes.set_xticks(range(len(names)), [style.plain(name) for name in names], size=min(10.5, size), weight="bold")
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0, pad=8)
    for i, axis in enumerate(scales):
        axes.vlines(i, 0, 1, color=style.MUTED, linewidth=1, zorder=2.5)
        for place, name in axis.ticks:
            axes.plot([i, i + 0.012 * len(scales)], [place, place], color=style.MUTED, linewidth=1, zorder=2.5)
            at = (i + 0.016 * len(scales), place)
            axes.text(*at, style.plain(name), size=9, va="center", color=style.INK, bbox=style.HALO, zorder=4)


def _fan(places: Sequence[float | None]) -> list[float | None]:
    """Equal places a little apart, so that lines that share a value can be followed."""
    shared: dict[float | None, int] = {}
    counts = Counter(places)
    fanned = []
    for place in places:
        turn = shared[place] = shared.get(place, -1) + 1
        share = counts[place]
        fanned.append(None if place is None else place + min(0.006, 0.04 / share) * (turn - (share - 1) / 2))
    return fanned


def _gradient(axes: "Axes", last: int, record: SearchRecord) -> None:
    """The last axis as the key of the colours."""
    import numpy as np

    colours = style.shades()(np.linspace(0, 1, 64) if record.mode == "min" else np.linspace(1, 0, 64))
    half = 0.0028 * (last + 1)  # of the width, which grows with the number of axes
    axes.imshow(colours[:, None], extent=(last - half, last + half, 0, 1), origin="lower", aspect="auto", zorder=2.6)


def _line(
    axes: "Axes", places: Sequence[float | None], colour: Any, width: float, alpha: float, dash: str = "-"
) -> None:
    """A smooth line that is level where it meets an axis; broken where a value has no place."""
    import numpy as np

    ease = (1 - np.cos(np.linspace(0, np.pi, 33))) / 2
    xs, ys = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(places)):
        low, high = (_NAN, _NAN) if start is None or stop is None else (start, stop)
        xs.append(i + np.linspace(0, 1, 33))
        ys.append(low + (high - low) * ease)
    if xs:
        axes.plot(
            np.concatenate(xs),
            np.concatenate(ys),
            dash,
            color=colour,
            linewidth=width,
            alpha=alpha,
            solid_capstyle="round",
        )


FIGURES: dict[str, Callable[[SearchRecord], "Figure"]] = {
    "parallel_coordinates": parallel,
    "learning_curves": curves,
    "learning_rate": rate,
    "importance": importances,
}
"""File name without its ending -> what draws it, in the order of the page."""
