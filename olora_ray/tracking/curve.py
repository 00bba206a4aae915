"""The learning curve of a run as a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Points = Sequence[tuple[int, float]]


def learning_curve_figure(train: Points, evaluation: Points) -> "Figure":
    """The losses over the steps; both are (step, loss) in order of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # With few points a line alone shows nothing.
    axes.plot(*_columns(train), color="#9bb7d4", linewidth=1.2, label="train", marker="." if len(train) < 3 else None)
    axes.plot(*_columns(evaluation), color="#c44e52", linewidth=1.8, label="eval", marker="o", markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.legend(frameon=False)
    return figure


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]
