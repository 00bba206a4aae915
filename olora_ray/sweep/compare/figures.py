"""The figures of a comparison: loss against learning rate, learning curves, and the differences to the baseline."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from olora_ray.sweep.compare import verdict
from olora_ray.sweep.compare.grid import BASELINE
from olora_ray.sweep.compare.record import ComparisonRecord, Point
from olora_ray.sweep.report import style, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
"""Of the grids of one method."""
FAR = 3.0
"""Times that the losses of all learning rates would have to lie one above the other to reach the base model's."""


def rates(record: ComparisonRecord) -> "Figure":
    """Loss on the tuning rows against the learning rate, a line for each grid."""
    points = [point for point in record.points if point.grid]
    losses = [point.loss for point in points if math.isfinite(point.loss)]
    far = bool(losses) and _is_far(record.base_tuning, losses)
    above = f"; base model: {record.base_tuning:.3f}, above the picture" if far else ""
    figure, axes = style.empty(
        "Learning rate and loss",
        f"tuning rows, seed {record.tuning_seed}; ring: the tuned point; x: broke off or above the picture{above}",
        width=12.0,
        height=4.8,
    )
    if not losses:
        style.say(axes, style.NOTHING)
        return figure
    low, top = min(losses), max(losses) if far else _top(record.base_tuning, losses)
    handles = []
    for number, method in enumerate(each.method for each in record.methods):
        own = [point for point in points if point.method == method]
        for place, alpha in enumerate(dict.fromkeys(point.alpha for point in own)):
            grid = sorted((point for point in own if point.alpha == alpha), key=lambda point: point.lr)
            handles.append(_grid(axes, grid, number, place, top))
    _base(axes, record.base_tuning, top)
    _rings(axes, record)
    axes.set_xscale("log")
    ticks = sorted({point.lr for point in points})
    shown = ticks[:: -(-len(ticks) // 12)]
    axes.set_xticks(shown, [text.number(rate) for rate in shown])
    axes.minorticks_off()
    axes.set_ylim(low - 0.06 * (top - low or 1), top + 0.04 * (top - low or 1))
    _finish(axes, "train.lr", "loss per token", handles)
    return figure


def _is_far(base: float, losses: Sequence[float]) -> bool:
    """Whether the base model is so much worse that beside it all losses would lie on one line."""
    spread = max(losses) - min(losses)
    return math.isfinite(base) and spread > 0 and base > max(losses) + FAR * spread


def _top(base: float, losses: Sequence[float]) -> float:
    """The upper end of a picture: the base model, or what is only a little worse."""
    low, high = min(losses), max(losses)
    if not math.isfinite(base) or base <= low:
        return high
    return max(base, min(high, base + 0.15 * (base - low)))


def _grid(axes: "Axes", grid: Sequence[Point], number: int, place: int, top: float) -> Any:
    colour, marker = _look(number)
    dash = _DASHES[place % len(_DASHES)]
    inside = [point for point in grid if point.loss <= top]
    label = style.plain(f"{grid[0].method}, alpha {grid[0].alpha:g}")
    (line,) = axes.plot(
        [point.lr for point in inside],
        [point.loss for point in inside],
        linestyle=dash,
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=1.8,
        label=label,
    )
    outside = [point.lr for point in grid if not point.loss <= top]
    axes.plot(outside, [top] * len(outside), "x", color=colour, markersize=8, markeredgewidth=2)
    return line


def _rings(axes: "Axes", record: ComparisonRecord) -> None:
    for each in record.methods:
        if each.tuned is not None:
            axes.plot(
                each.tuned.cell.lr,
                each.tuned.loss,
                "o",
                markersize=14,
                markerfacecolor="none",
                markeredgecolor=style.BEST,
                markeredgewidth=2,
            )


def curves(record: ComparisonRecord) -> "Figure":
    """Held-out loss over the steps at the tuned learning rates: mean and range over the seeds."""
    figure, axes = style.empty(
        "Learning curves", f"test rows; line: mean over {len(record.seeds)} seeds, band: their range"
    )
    handles, last = [], []
    for number, method in enumerate(record.methods):
        whole = [each.curve for each in method.trainings if math.isfinite(each.loss)]
        steps = sorted(set.intersection(*({step for step, _ in curve} for curve in whole)) if whole else ())
        if not steps:
            continue
        values = [[dict(curve)[step] for curve in whole] for step in steps]
        colour, _ = _look(number)
        means = [sum(each) / len(each) for each in values]
        (line,) = axes.plot(steps, means, color=colour, linewidth=2, label=style.plain(method.method))
        axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.18, linewidth=0)
        handles.append(line)
        last += means[1:] or means
    if not handles:
        style.say(axes, style.NOTHING)
        return figure
    _base(axes, record.base_test, _top(record.base_test, last))
    _finish(axes, "step", "loss per token", handles)
    return figure


def forest(record: ComparisonRecord) -> "Figure":
    """The difference of each method to the baseline with its adjusted interval."""
    figure, axes = style.empty(
        f"Difference to {BASELINE}",
        f"nats per token, {record.level:.0%} intervals over seeds and rows, together; band: ±{record.relevant:g}",
    )
    found = [(each.method, each.against) for each in record.others() if each.against]
    if not found:
        style.say(axes, "no difference was measured")
        return figure
    axes.axvspan(-record.relevant, record.relevant, color=style.GRID, zorder=0)
    axes.axvline(0, color=style.MUTED, linewidth=1)
    for place, (_, against) in enumerate(reversed(found)):
        colour = style.BEST if against.p_holm < verdict.ERROR else style.GOOD
        axes.plot([against.adjusted.low, against.adjusted.high], [place, place], color=colour, linewidth=2.4)
        axes.plot(against.mean, place, "o", color=colour, markersize=8)
    axes.set_yticks(range(len(found)), [style.plain(method) for method, _ in reversed(found)])
    axes.set_ylim(-0.6, len(found) - 0.4)
    ends = [abs(end) for _, each in found for end in (each.adjusted.low, each.adjusted.high) if math.isfinite(end)]
    reach = 1.12 * max([record.relevant, *ends])
    axes.set_xlim(-reach, reach)
    style.label(axes, f"loss - {BASELINE}'s  (left of the band: lower by what matters)", "")
    return figure


def _base(axes: "Axes", base: float, top: float) -> None:
    if math.isfinite(base) and base <= top:
        axes.axhline(base, color=style.MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate("base", (1.0, base), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", size=9, color=style.MUTED)  # fmt: skip


def _finish(axes: "Axes", x: str, y: str, handles: Sequence[Any]) -> None:
    style.label(axes, x, y)
    axes.grid(axis="y", color=style.GRID, linewidth=0.8)
    style.legend(axes, handles)


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a method."""
    return style.GROUPS[number % len(style.GROUPS)]


FIGURES: dict[str, Callable[[ComparisonRecord], "Figure"]] = {
    "learning_rates": rates,
    "curves": curves,
    "differences": forest,
}
"""File name without its ending -> what draws it, in the order of the page."""
