"""Scales that put the values of a field on an axis from 0 to 1: linear, logarithmic, or one place per category."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from olora_ray.sweep.record import Mode
from olora_ray.sweep.report import text

_MANY = 6  # more distinct numbers than this get round ticks, fewer a tick each
_LOG_RATIO = 8.0  # numbers that differ by this factor are seen better on a logarithmic axis
_GAP = 0.07  # ticks nearer than this would overlap
_BAND = 0.1  # part of the axis that is kept for values too bad to be drawn to scale
_LONGEST = 16  # characters of a category's label


@dataclass(frozen=True)
class Scale:
    """An axis; values outside of low..high are put at its end."""

    kind: Literal["linear", "log", "category"]
    low: float = 0.0
    high: float = 0.0
    categories: tuple[str, ...] = ()
    """Texts of the values, of a category scale."""
    ticks: tuple[tuple[float, str], ...] = ()
    """(position, label), none too near to another."""
    worse: Literal["", "above", "below"] = ""
    """The end beyond which values lie that are too bad to be drawn to scale; all of them are put at the very end."""

    def position(self, value: Any) -> float | None:
        """Where the value lies, 0 to 1; None if it has no place (missing, NaN)."""
        if self.kind == "category":
            shown = text.value(value)
            if shown not in self.categories:
                return None
            last = len(self.categories) - 1
            return self.categories.index(shown) / last if last else 0.5
        if not is_number(value) or (self.kind == "log" and value <= 0):
            return None
        if self.low == self.high:
            return 0.5
        low, high, at = (math.log(x) if self.kind == "log" else x for x in (self.low, self.high, float(value)))
        place = (at - low) / (high - low)
        if self.worse and 0 <= place <= 1:
            place = place * (1 - _BAND) + (_BAND if self.worse == "below" else 0.0)
        return min(1.0, max(0.0, place))


def is_number(value: Any) -> bool:
    """A finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def of(values: Iterable[Any]) -> Scale:
    """The scale that shows these values best; mixed types are categories, NaN has no place."""
    known = [value for value in values if not (isinstance(value, float) and not math.isfinite(value))]
    if known and all(is_number(value) for value in known):
        return _numeric(sorted({float(value) for value in known}))
    categories = tuple(dict.fromkeys(text.value(value) for value in known))
    places = [(i / max(1, len(categories) - 1), name) for i, name in enumerate(categories)]
    if len(places) == 1:
        places = [(0.5, categories[0])]
    cut = [(place, text.value(name, _LONGEST)) for place, name in places]
    return Scale("category", categories=categories, ticks=_apart(cut))


def of_metric(values: Iterable[float | None], mode: Mode) -> Scale:
    """A linear scale of the metric that ends where values are so bad that they would flatten all others.

    The bad end is cut three spreads of the better three quarters beyond them.
    """
    known = sorted(float(value) for value in values if value is not None and math.isfinite(value))
    if not known:
        return Scale("linear", 0.0, 0.0)
    if mode == "max":
        known = [-value for value in reversed(known)]
    low, quarter = known[0], known[(3 * (len(known) - 1)) // 4]
    fence = quarter + 3 * (quarter - low)
    # Equal values have no spread to measure an outlier by.
    high = max(value for value in known if value <= fence) if quarter > low else known[-1]
    cut = high < known[-1]
    if mode == "min":
        scale = Scale("linear", low, high, worse="above" if cut else "")
    else:
        scale = Scale("linear", -high, -low, worse="below" if cut else "")
    ticks = [tick for tick in _round_ticks(scale) if not cut or abs(tick[0] - (mode == "min")) >= _GAP]
    worst = {"above": [(1.0, "worse")], "below": [(0.0, "worse")], "": []}[scale.worse]
    return replace(scale, ticks=tuple(sorted([*ticks, *worst])))


def _numeric(distinct: Sequence[float]) -> Scale:
    low, high = distinct[0], distinct[-1]
    kind: Literal["linear", "log"] = "log" if low > 0 and _log_like(distinct) else "linear"
    scale = Scale(kind, low, high)
    if len(distinct) > _MANY:
        return Scale(kind, low, high, ticks=_round_ticks(scale))
    places = [scale.position(value) or 0.0 for value in distinct]
    return Scale(kind, low, high, ticks=_apart(list(zip(places, text.numbers(distinct), strict=True))))


def _log_like(distinct: Sequence[float]) -> bool:
    if distinct[-1] / distinct[0] >= _LOG_RATIO:
        return True
    ratios = [after / before for before, after in itertools.pairwise(distinct)]
    return len(ratios) > 1 and min(ratios) >= 1.5 and max(ratios) - min(ratios) < 1e-6


def _round_ticks(scale: Scale) -> tuple[tuple[float, str], ...]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if scale.low == scale.high:
        return ((0.5, text.number(scale.low)),)
    if scale.kind == "log":
        decades = math.log10(scale.high / scale.low)
        subs = (1.0, 2.0, 5.0) if decades < 3.5 else (1.0,)
        found = LogLocator(subs=subs, numticks=20).tick_values(scale.low, scale.high)
    else:
        found = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(scale.low, scale.high)
    # What rounding leaves of a zero.
    clean = [0.0 if abs(tick) < 1e-9 * (scale.high - scale.low) else float(tick) for tick in found]
    inside = [tick for tick in clean if scale.low <= tick <= scale.high] or [scale.low, scale.high]
    places = [scale.position(tick) or 0.0 for tick in inside]
    return _apart(list(zip(places, text.numbers(inside), strict=True)))


def _apart(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    kept: list[tuple[float, str]] = []
    for place, label in ticks:
        if not kept or place - kept[-1][0] >= _GAP:
            kept.append((place, label))
    return tuple(kept)
