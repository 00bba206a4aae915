"""The values that a search gives one field: a list, a range, or the value of another field times a factor."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, Field, field_validator, model_validator

from olora_ray.config.section import LARGEST, Section

TIMES = ":times"
"""`FIELD:times` is the name of the factor that is drawn for a field with `of`."""
MOST_LISTED = 1_000
"""Values that a list may have: each is checked against the config before a search begins."""
MOST_STEPS = 1_000_000
"""Values that a quniform may have."""
MISSING = object()
"""What `Domain.draw_of` returns for a value that the domain does not have; None is a value like others."""


class Chooser(Protocol):
    """Draws values; the searchers differ in this only."""

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`."""

    def number(self, name: str, domain: "Domain") -> Any:
        """A number of the domain's range."""


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, not {value}")
    return value


Number = Annotated[float, BeforeValidator(_number)]
"""An int or float that is finite; neither true nor a text that looks like a number."""
Listed = Annotated[tuple[Any, ...], Field(min_length=1)]


class Domain(Section):
    """The values of one field; exactly one of choice, grid, uniform, loguniform, quniform, of."""

    choice: Listed | None = None
    """One of these."""
    grid: Listed | None = None
    """Each of these in turn, crossed with the other grids."""
    uniform: tuple[Number, Number] | None = None
    """A number between [low, high]."""
    loguniform: tuple[Number, Number] | None = None
    """The same, with a uniform logarithm."""
    quniform: tuple[Number, Number, Number] | None = None
    """[low, high, step]: low, low + step, low + 2 step, ..., up to high."""
    of: str | None = None
    """The value of this other field, times `times`."""
    times: float | Annotated[tuple[float, ...], Field(min_length=1)] = 1.0
    """Factor for `of`, or a list of factors of which one is drawn."""

    @field_validator("times", mode="before")
    @classmethod
    def _of_numbers(cls, value: object) -> object:
        for factor in value if isinstance(value, list | tuple) else [value]:
            _number(factor)
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "Domain":
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"needs exactly one of {', '.join(KINDS)}")
        for problem in _problems(self, kinds[0]):
            raise ValueError(problem)
        return self

    def options(self) -> tuple[Any, ...]:
        """The listed values; empty for a range."""
        return self.choice or self.grid or ()

    def interval(self) -> tuple[float, float] | None:
        """(low, high) of a range."""
        found = self.uniform or self.loguniform or self.quniform
        return (found[0], found[1]) if found else None

    def steps(self) -> int:
        """How many values a quniform has; 0 for all others."""
        if self.quniform is None:
            return 0
        low, high, step = self.quniform
        return math.floor((high - low) / step + 1e-9) + 1

    def at(self, place: int) -> Any:
        """The value of a quniform after so many steps; an int where low and step are whole."""
        assert self.quniform is not None
        low, _, step = self.quniform
        if float(low).is_integer() and float(step).is_integer():
            return int(low) + place * int(step)
        return float(f"{low + place * step:.12g}")  # 0.3, not 0.30000000000000004

    def extremes(self) -> tuple[Any, ...]:
        """Every listed value, or both ends of a range; empty for `of`."""
        if self.quniform:
            return self.at(0), self.at(self.steps() - 1)
        return self.options() or self.interval() or ()

    def probes(self) -> tuple[Any, ...]:
        """Values that must be valid if all are: the extremes, and of a range one that lies between them."""
        if self.quniform:
            return *self.extremes(), self.at(1)
        interval = self.interval()
        return (*interval, between(interval)) if interval else self.options()

    def draw(self, field: str, chooser: Chooser) -> dict[str, Any]:
        """The draws that the field's value follows from."""
        if self.of is not None:
            return {field + TIMES: chooser.choice(field + TIMES, self.factors())}
        if options := self.options():
            return {field: chooser.choice(field, options)}
        return {field: chooser.number(field, self)}

    def draw_of(self, value: Any) -> Any:
        """The draw that gives `value`, for a field without `of`; MISSING if there is none."""
        if options := self.options():
            return value if value in options else MISSING
        interval = self.interval()
        assert interval is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not interval[0] <= value <= interval[1]:
            return MISSING
        if self.quniform is None:
            return value
        place = round((value - self.quniform[0]) / self.quniform[2])
        return self.at(place) if place < self.steps() and math.isclose(self.at(place), value, abs_tol=0) else MISSING

    def factors(self) -> tuple[float, ...]:
        """The factors that `of` may be multiplied by."""
        return self.times if isinstance(self.times, tuple) else (self.times,)


KINDS = ("choice", "grid", "uniform", "loguniform", "quniform", "of")


def between(interval: tuple[float, float]) -> float:
    """A number inside of the range, with a fractional part wherever most of the range has one."""
    low, high = interval
    return rounded(low + (high - low) * 0.6180339887, low, high)


def rounded(value: float, low: float, high: float) -> float:
    """A number of a range with four digits that tell it from its neighbours: a person can read them."""
    beside = max(abs(low), abs(high)) / (high - low)  # large for a narrow range far from 0
    digits = min(17, 4 + max(0, math.floor(math.log10(beside))))
    return min(max(float(f"{value:.{digits}g}"), low), high)


def _problems(domain: Domain, kind: str) -> Iterator[str]:
    if domain.of is None and "times" in domain.model_fields_set:
        yield "times: only goes with of"
    yield from _listed_problems(kind, domain.options())
    yield from _listed_problems("times", domain.factors())
    if interval := domain.interval():
        yield from _range_problems(domain, kind, interval)


def _range_problems(domain: Domain, kind: str, interval: tuple[float, float]) -> Iterator[str]:
    low, high = interval
    if not low < high:
        yield f"{kind} {[low, high]} is an empty range: the first number must be the smaller one"
    if kind == "loguniform" and low <= 0:
        yield "loguniform needs numbers greater than 0"
    if domain.quniform:
        step = domain.quniform[2]
        if not 0 < step <= high - low:
            yield f"quniform {list(domain.quniform)}: the step must be positive and fit between the others"
        elif (high - low) / step >= MOST_STEPS:
            yield f"quniform {list(domain.quniform)} has more than {MOST_STEPS:,} values; use uniform"


def _listed_problems(kind: str, values: Sequence[Any]) -> Iterator[str]:
    if len(values) > MOST_LISTED:
        yield f"{kind} has {len(values):,} values, more than {MOST_LISTED:,}"
    for value in _numbers_in(values):
        if not abs(value) <= LARGEST:  # nan too
            yield f"{kind} has {value!r}; numbers go up to {LARGEST}"
    seen = set[str]()
    for value in values:
        # 8 and 8.0 are the same training, 1 and true are not.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        name = f"{float(value)!r}" if number and abs(value) <= LARGEST else repr(value)
        if name in seen:
            yield f"{kind} has {value!r} twice"
        seen.add(name)


def _numbers_in(value: Any) -> Iterator[int | float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers_in(item)
    elif isinstance(value, dict):
        yield from _numbers_in(list(value.values()))
    elif isinstance(value, int | float):
        yield value
