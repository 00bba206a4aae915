import io
import itertools
import warnings

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from olora_ray.sweep.report import style
from olora_ray.sweep.report.figures import FIGURES, importances, parallel
from olora_ray.sweep.report.learning_curves import curves
from olora_ray.sweep.report.scatter import rate
from tests.sweep.odd import ODD, search
from tests.sweep.searches import realistic

ORANGE = [int(style.BEST[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return imread(io.BytesIO(buffer.getvalue()))[..., :3]


def texts(figure: Figure) -> list[str]:
    return [item.get_text() for item in figure.findobj(Text) if item.get_text()]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("name", ODD)
def test_whatever_a_search_is_it_can_be_drawn(name: str, figure: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        painted = pixels(FIGURES[figure](ODD[name]))
    assert painted.std() > 0


@pytest.mark.parametrize("draw", [parallel, curves, rate])
def test_the_best_trial_stands_out_and_only_where_there_is_one(draw: object) -> None:
    def orange(record: object) -> int:
        return int((np.abs(pixels(draw(record)) - ORANGE).max(axis=-1) < 0.02).sum())  # type: ignore[operator]

    assert orange(realistic()) > 20
    assert orange(ODD["all failed"]) == 0


def out_of_view(axis: Axis, limits: tuple[float, float]) -> list[Text]:
    """Labels of ticks that lie outside of the axis, which are not drawn."""
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in ticks if not limits[0] <= place <= limits[1]]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("record", [realistic(), ODD["many fields"]], ids=["realistic", "many fields"])
def test_no_word_is_cut_off_and_no_two_labels_overlap(figure: str, record: object) -> None:
    drawn = style.some(FIGURES[figure](record), 300, 2000)  # type: ignore[arg-type]
    drawn.draw_without_rendering()
    axes = drawn.axes[0]
    hidden = [*out_of_view(axes.xaxis, axes.get_xlim()), *out_of_view(axes.yaxis, axes.get_ylim())]
    words = [item for item in drawn.findobj(Text) if item.get_text().strip() and item.get_visible()]
    boxes = {item: item.get_window_extent() for item in words if item not in hidden}
    for item, box in boxes.items():
        assert drawn.bbox.x0 <= box.x0 < box.x1 <= drawn.bbox.x1, item.get_text()
        assert drawn.bbox.y0 <= box.y0 < box.y1 <= drawn.bbox.y1, item.get_text()
    headings = [boxes[item] for item in drawn.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(headings, 2))
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        shown = [boxes[label] for label in labels if label in boxes]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(shown, 2))


def test_curves_show_where_trials_were_stopped() -> None:
    record = realistic()
    stopped = [trial for trial in record.trials if trial.status == "stopped"]
    ends = {
        (line.get_xdata()[0], line.get_ydata()[0]) for line in curves(record).axes[0].lines if line.get_marker() == "o"
    }
    assert ends == {trial.curve[-1] for trial in stopped}
    shown = " ".join(item for item in texts_of_legend(curves(record)))
    assert f"stopped ({len(stopped)})" in shown
    assert "failed (1)" in shown
    assert "trial 0, the default config" in shown


def texts_of_legend(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return [item.get_text() for item in legend.get_texts()]


def test_a_diverged_curve_leaves_the_picture_and_this_is_said() -> None:
    figure = curves(ODD["one diverged"])
    assert figure.axes[0].get_ylim()[1] < 2
    assert any("outside of the picture: 1 trial" in item for item in texts(figure))


def test_the_rate_is_drawn_by_rank_on_a_logarithmic_axis() -> None:
    figure = rate(realistic())
    assert figure.axes[0].get_xlabel() == "train.lr"
    assert texts_of_legend(figure) == ["8", "16", "32", "64", "no value"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][:3] == ["5e-5", "1e-4", "2e-4"]


def test_without_a_rate_the_most_important_number_takes_its_place() -> None:
    rows = [({"a.word": "xy"[i % 2], "a.little": i % 3, "a.much": i}, float(i)) for i in range(12)]
    assert rate(search(rows)).axes[0].get_xlabel() == "a.much"


def test_importances_say_that_there_are_too_few_trials() -> None:
    assert any("too few trials" in item for item in texts(importances(ODD["one trial"])))


def test_dollars_are_not_taken_for_mathematics() -> None:
    figure = parallel(search([({"a.$x$": "$y$"}, 1.0)]))
    figure.draw_without_rendering()
    assert not any(item.get_text() == "$y$" for item in figure.findobj(Text))
