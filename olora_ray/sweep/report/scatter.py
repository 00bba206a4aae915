"""One field against the metric: learning rate against loss by rank, where these are searched."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from olora_ray.sweep.record import SearchRecord, TrialRecord
from olora_ray.sweep.report import axis, importance, style, text
from olora_ray.sweep.report.axis import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {"train.lr": "Learning rate"}
_FEW = len(style.GROUPS)  # values of a field that get a colour each


def rate(record: SearchRecord) -> "Figure":
    """Learning rate against the metric, coloured by rank; of other searches the most important field instead."""
    field, group = _rate_fields(record)
    if field is None:
        figure, axes = style.empty("A field and the metric", "")
        style.say(axes, "no field is searched")
        return figure
    names = text.short(record.fields)
    by = f", by {text.value(names[group], 26)}" if group else ""
    best = record.best()
    figure, axes = style.empty(
        f"{_TITLES.get(field, text.value(names[field], 26))} and {style.metric(record)}{by}",
        f"hollow: stopped early{style.named(best)}",
    )
    across, metric = (
        axis.of(trial.params[field] for trial in record.trials if field in trial.params),
        style.metric_scale(record),
    )
    style.ticks(axes, across, "x")
    style.ticks(axes, metric, "y")
    style.label(axes, field, style.metric_name(record))
    shown = [trial for trial in record.trials if across.position(trial.params.get(field)) is not None]
    looks = _Looks(record, group)
    for trial in shown:
        _point(axes, trial, across.position(trial.params[field]) or 0.0, metric, looks)
    _note_default(axes, record, field, across, metric)
    if best in shown and best is not None:
        at = (across.position(best.params[field]) or 0.0, metric.position(best.value) or 0.0)
        axes.plot(*at, "o", markersize=17, markerfacecolor="none", markeredgecolor=style.BEST, markeredgewidth=2.4)
    if metric.worse:
        axes.axhline(0.95 if metric.worse == "above" else 0.05, color=style.MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    style.legend(
        axes, [*(looks.handles() if best else []), *_marks(shown)], text.value(names[group], 26) if group else ""
    )
    return figure


class _Looks:
    """Colour and marker of a trial by its value of a field: few values get one each, many numbers a shade."""

    def __init__(self, record: SearchRecord, field: str | None) -> None:
        self._field = field
        values = [trial.params[field] for trial in record.trials if field in trial.params] if field else []
        self._scale = axis.of(values)
        numeric = self._scale.kind != "category"
        numbers = sorted({item for item in values if axis.is_number(item)}) if numeric else values
        self._values = list(dict.fromkeys(map(text.value, numbers)))  # of lists and mappings too

    def of(self, trial: TrialRecord) -> tuple[Any, str]:
        """(colour, marker)."""
        if self._field is None:
            return style.GROUPS[0]
        item = trial.params.get(self._field, float("nan"))
        if len(self._values) <= _FEW:
            shown = text.value(item)
            return style.GROUPS[self._values.index(shown)] if shown in self._values else (style.MUTED, "o")
        place = self._scale.position(item)
        return (style.MUTED if place is None else style.shades()(1 - place)), "o"

    def handles(self) -> list[Any]:
        """What the legend shows."""
        if len(self._values) <= _FEW:
            return [
                _dot(style.plain(text.value(name, 18)), *look)
                for name, look in zip(self._values, style.GROUPS, strict=False)
            ]
        return [_dot(style.plain(name), style.shades()(1 - place), "o") for place, name in self._scale.ticks]


def _rate_fields(record: SearchRecord) -> tuple[str | None, str | None]:
    """The field of the x axis and the one of the colours."""
    fields = [name for name in record.fields if any(name in trial.params for trial in record.trials)]
    if not {"train.lr", "adapter.rank"} <= set(fields):
        order = importance.of(record).order()
        fields.sort(key=lambda name: order.index(name) if name in order else len(order))
    kinds = {name: axis.of(t.params[name] for t in record.trials if name in t.params).kind for name in fields}
    numeric = [name for name in fields if kinds[name] != "category"]
    field = next((name for name in ["train.lr", *numeric, *fields] if name in fields), None)
    others = [name for name in ["adapter.rank", *fields] if name in fields and name != field]
    return field, next(iter(others), None)


def _point(axes: "Axes", trial: TrialRecord, x: float, metric: Scale, looks: _Looks) -> None:
    colour, marker = looks.of(trial)
    place = metric.position(trial.value) if trial.measured() else None
    if place is None:
        axes.plot(x, 1.05, "x", color=style.FAILED, markersize=8, markeredgewidth=2, clip_on=False)
        return
    hollow = trial.status != "finished"
    face = "white" if hollow else colour
    axes.plot(x, place, marker, color=colour, markersize=8.5, markerfacecolor=face, markeredgewidth=1.8)


def _note_default(axes: "Axes", record: SearchRecord, field: str, across: Scale, metric: Scale) -> None:
    default = record.of(record.default)
    if default is None or not default.measured() or across.position(default.params.get(field)) is None:
        return
    at = (across.position(default.params[field]) or 0.0, metric.position(default.value) or 0.0)
    axes.annotate(
        "default", at, (11, 0), textcoords="offset points", va="center", size=9, color=style.MUTED, bbox=style.HALO
    )


def _marks(shown: Sequence[TrialRecord]) -> list[Any]:
    from matplotlib.lines import Line2D

    if all(trial.measured() for trial in shown):
        return []
    return [Line2D([], [], color=style.FAILED, marker="x", linestyle="", markeredgewidth=2, label="no value")]


def _dot(name: str, colour: Any, marker: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=name)
