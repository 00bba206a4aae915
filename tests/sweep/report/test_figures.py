"""The contents of a search's figures, for usual and unusual searches. People judge the look."""

import io
import itertools
import warnings
from collections.abc import Callable
from functools import partial

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from olora_ray.sweep.record import SearchRecord
from olora_ray.sweep.report.figures import FIGURES, curves, render
from tests.sweep.odd import ODD
from tests.sweep.searches import realistic

Draw = Callable[[SearchRecord], Figure]


def texts(figure: Figure) -> list[str]:
    return [item.get_text() for item in figure.findobj(Text) if item.get_text()]


def named(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [item.get_text() for item in legend.get_texts()]


FIRST = (
    "no trials",
    "all failed",
    "NaN and infinity",
    "mixed types",
    "missing parameters",
    "nasty text",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in ODD]
)
def test_whatever_a_search_is_it_can_be_drawn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = render({figure: partial(draw, ODD[name]) for figure, draw in FIGURES.items()})
    assert all(imread(io.BytesIO(png)).std() > 0 for png in drawn.values())


@pytest.mark.parametrize("draw", FIGURES.values())
@pytest.mark.parametrize(
    "record", [realistic(), ODD["many fields"]], ids=["realistic", "many fields"]
)
def test_no_word_is_cut_off_and_no_two_labels_overlap(draw: Draw, record: SearchRecord) -> None:
    drawn = draw(record)
    drawn.draw_without_rendering()
    axes = drawn.axes[0]
    for box in (item.get_tightbbox() for item in [*drawn.texts, axes]):
        assert drawn.bbox.x0 <= box.x0 < box.x1 <= drawn.bbox.x1
        assert drawn.bbox.y0 <= box.y0 < box.y1 <= drawn.bbox.y1
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_curves_show_where_trials_were_stopped() -> None:
    record = realistic()
    stopped = [trial for trial in record.trials if trial.status == "stopped"]
    ends = {(line.get_xdata()[-1], line.get_ydata()[-1]) for line in curves(record).axes[0].lines
            if line.get_marker() == "o"}  # fmt: skip
    assert ends == {trial.curve[-1] for trial in stopped}
    shown = named(curves(record))
    assert {f"stopped ({len(stopped)})", "failed (1)", "trial 0, the default config"} <= set(shown)


def test_a_diverged_curve_leaves_the_picture_and_this_is_said() -> None:
    figure = curves(ODD["one diverged"])
    assert figure.axes[0].get_ylim()[1] < 2
    assert any("far worse, drawn at the edge or outside: 1 trial" in item for item in texts(figure))
