"""Style of the figures of a search: colours that the colour-blind can tell apart, type sizes, an empty figure."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import axis as scale
from olora_ray.sweep.report import text
from olora_ray.sweep.report.axis import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BEST = "#d55e00"
"""The best trial, in all figures and on the page; nothing else has this colour."""
INK, MUTED, GRID = "#1f2933", "#5f6c7b", "#e4e7eb"
GOOD, FADED, FAILED = "#2f7fb5", "#8fb3cc", "#8c2d72"
GROUPS = (("#0072b2", "o"), ("#009e73", "s"), ("#cc79a7", "^"), ("#e0a100", "D"), ("#56b4e9", "v"), ("#4d4d4d", "P"))
"""Colour and marker of the values of one field (Okabe and Ito's palette, without the colour of the best)."""

HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
"""Behind a word that lies on lines."""
NOTHING = "no trial has a value"

_TITLE, _TEXT, _SMALL = 13.0, 10.0, 9.0


def empty(title: str, subtitle: str, width: float = 6.8, height: float = 4.4) -> tuple["Figure", "Axes"]:
    """A figure of so many inches with its heading, and axes without a box."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=_room(height), w_pad=0.02)
    left, top = 0.18 / width, 1 - 0.14 / height
    figure.text(left, top, plain(title), size=_TITLE, weight="bold", color=INK, va="top")
    figure.text(left, top - 0.27 / height, plain(subtitle), size=_SMALL, color=MUTED, va="top")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=_SMALL, labelcolor=INK)
    axes.set_axisbelow(True)
    return figure, axes


def _room(height: float, below: float = 0.0) -> tuple[float, float, float, float]:
    """(left, bottom, width, height) of what is drawn, as shares of the figure; `below` in inches is left free."""
    return 0.012, 0.015 + below / height, 0.976, 0.985 - (0.66 + below) / height


def some(figure: "Figure", drawn: int, trials: int) -> "Figure":
    """The figure; one that does not show all trials says so."""
    if drawn < trials:
        height = figure.get_size_inches()[1]
        figure.set_layout_engine("constrained", rect=_room(height, below=0.2), w_pad=0.02)
        said = f"{drawn:,} of {trials:,} trials"
        figure.text(0.988, 0.06 / height, said, size=_SMALL, color=MUTED, va="bottom", ha="right")
    return figure


def say(axes: "Axes", sentence: str) -> None:
    """Instead of a picture: why there is none."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, plain(sentence), transform=axes.transAxes, ha="center", va="center", size=12, color=MUTED)


def label(axes: "Axes", x: str = "", y: str = "") -> None:
    """Name both axes."""
    axes.set_xlabel(plain(x), size=_TEXT, color=INK)
    axes.set_ylabel(plain(y), size=_TEXT, color=INK)


def legend(axes: "Axes", handles: Sequence[object], title: str = "") -> None:
    """A legend to the right of the axes, where it hides nothing."""
    if not handles:
        return
    drawn = axes.legend(
        handles=handles,
        title=plain(title),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=_SMALL,
        title_fontsize=_SMALL,
        labelcolor=INK,
        alignment="left",
        handlelength=2.2,
    )
    drawn.get_title().set_color(MUTED)


def ticks(axes: "Axes", scale: Scale, which: Literal["x", "y"]) -> None:
    """Draw the ticks of a 0 to 1 scale on the x or the y axis, with a little room at both ends."""
    set_ticks, set_limits = (axes.set_xticks, axes.set_xlim) if which == "x" else (axes.set_yticks, axes.set_ylim)
    set_ticks([place for place, _ in scale.ticks], [plain(name) for _, name in scale.ticks])
    set_limits(-0.05, 1.05)
    axes.grid(axis=which, color=GRID, linewidth=0.8)


@cache
def shades() -> "Colormap":
    """One hue from dark (good) to light (bad), so that order shows without telling colours apart."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("good to bad", ["#0b3c68", GOOD, "#86bbdb", "#cbdde9"])


def metric_scale(record: SearchRecord) -> Scale:
    """The axis of the trials' values."""
    return scale.of_metric([trial.value for trial in record.ranked()], record.mode)


def metric(record: SearchRecord) -> str:
    """The metric's name, short enough for a title."""
    return text.value(record.metric, 26)


def metric_name(record: SearchRecord) -> str:
    """The axis label of the metric."""
    return f"{metric(record)}  ({better(record)})"


def better(record: SearchRecord) -> str:
    """Which way is good."""
    return f"{'lower' if record.mode == 'min' else 'higher'} is better"


def named(best: TrialRecord | None) -> str:
    """The end of a subtitle: which trial is the best, and how to see it."""
    return f"; orange: trial {best.number}, the best" if best else ""


def shade(record: SearchRecord, place: float) -> tuple[float, ...]:
    """The colour of a value at this place of the metric's axis."""
    return tuple(shades()(place if record.mode == "min" else 1 - place))


def plain(words: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return words.replace("$", r"\$")
