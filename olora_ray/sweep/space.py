"""A space file: what a search varies, how it is searched, and when it ends.

    search:
      adapter.rank: {choice: [8, 16, 32]}
      adapter.alpha: {of: adapter.rank, times: [1, 2]}      # depends on another field
      train.lr: {loguniform: [1.0e-4, 2.0e-3]}
    metric: eval/loss

A trial's values are a function of its *draws*: field -> drawn value, and `FIELD:times` -> drawn factor. Random
and grid searches draw with a generator seeded by (seed, number of the trial), so that a search that starts
again has the same trials.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from olora_ray.config.dotted import flatten
from olora_ray.config.field_types import PositiveInt
from olora_ray.config.schema import Config, Section

Draws = Mapping[str, Any]
TIMES = ":times"
SAME_BASE = ("adapter.", "train.")
"""What adapters that share one base model may differ in."""
LOWER_IS_BETTER = ("eval/loss", "eval/perplexity", "train/loss")


class Chooser(Protocol):
    """Draws values; the searchers differ in this only."""

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`."""

    def number(self, name: str, low: float, high: float, log: bool, step: float | None) -> float:
        """A number from low to high."""


class Domain(Section):
    """The values of one field; exactly one of choice, grid, uniform, loguniform, quniform, of."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these."""
    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Each of these in turn, crossed with the other grids."""
    uniform: tuple[float, float] | None = None
    """A number between [low, high]."""
    loguniform: tuple[float, float] | None = None
    """The same, with a uniform logarithm."""
    quniform: tuple[float, float, float] | None = None
    """[low, high, step]: a multiple of step between low and high."""
    of: str | None = None
    """The value of this other field, times `times`."""
    times: float | Annotated[tuple[float, ...], Field(min_length=1)] = 1.0
    """Factor for `of`, or a list of factors of which one is drawn."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Domain":
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"needs exactly one of {', '.join(KINDS)}")
        interval = self.uniform or self.loguniform or self.quniform
        if interval and not (math.isfinite(interval[0]) and math.isfinite(interval[1]) and interval[0] < interval[1]):
            raise ValueError(f"{kinds[0]} {list(interval)} is an empty range: the first number must be the smaller one")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs numbers greater than 0")
        if self.quniform and not 0 < self.quniform[2] <= self.quniform[1] - self.quniform[0]:
            raise ValueError(f"quniform {list(self.quniform)}: the step must be positive and fit between the others")
        return self

    def options(self) -> tuple[Any, ...]:
        """The listed values; empty for a range."""
        return self.choice or self.grid or ()

    def extremes(self) -> tuple[Any, ...]:
        """Values that must be valid if all are: every listed one, or both ends."""
        interval = self.uniform or self.loguniform or self.quniform
        return self.options() or tuple(_whole(end, self.quniform) for end in (interval or ())[:2])

    def draw(self, field: str, chooser: Chooser) -> dict[str, Any]:
        """The draws that the field's value follows from."""
        if self.of is not None:
            return {field + TIMES: chooser.choice(field + TIMES, self.factors())}
        if options := self.options():
            return {field: chooser.choice(field, options)}
        low, high = self.extremes()
        step = self.quniform[2] if self.quniform else None
        return {field: _whole(chooser.number(field, low, high, self.loguniform is not None, step), self.quniform)}

    def factors(self) -> tuple[float, ...]:
        """The factors that `of` may be multiplied by."""
        return self.times if isinstance(self.times, tuple) else (self.times,)


KINDS = ("choice", "grid", "uniform", "loguniform", "quniform", "of")


class Scheduler(Section):
    """Which trials are stopped before their end."""

    kind: Literal["asha", "median", "population", "none"] = "asha"
    """asha: successive halving; median: below the others' median; population: PBT; none: all run to the end."""
    grace: PositiveInt | None = None
    """Steps that every trial may do; null: up to its first evaluation."""
    reduction: Annotated[float, Field(gt=1.0)] = 3.0
    """asha: of so many trials that come to a rung one continues."""
    interval: PositiveInt | None = None
    """population: steps between two looks at the others; null: train.eval_every."""


class Space(Section):
    """A search, whole."""

    search: Annotated[dict[str, Domain], Field(min_length=1)]
    """Dotted config field -> its values."""
    set: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Changes of the config that all trials share, e.g. {train.steps: 40}."""
    metric: str = "eval/loss"
    """eval/loss, eval/perplexity, train/loss, or score/NAME of the config's scorer (measured at the end only)."""
    mode: Literal["min", "max"] | None = None
    """null: min for losses, max for scores."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """random; grid: every combination once; tpe: Optuna's tree-structured Parzen estimator."""
    scheduler: Scheduler = Scheduler()
    trials: PositiveInt | None = None
    """Number of trials, the default one included; null: 16, or every combination of a grid."""
    concurrency: PositiveInt | None = None
    """Trials at the same time; null: as many as the cluster has room for."""
    trials_per_worker: PositiveInt = 1
    """Adapters that one worker trains side by side on one copy of the base model."""
    include_default: bool = True
    """Whether the config as it is is one of the trials, the first."""
    time_budget: Annotated[float, Field(gt=0.0)] | None = None
    """Seconds after which no trial continues."""
    patience: PositiveInt | None = None
    """End the search when so many trials in a row have ended without a better value."""
    min_improvement: Annotated[float, Field(ge=0.0)] = 0.0
    """By how much a value must be better to count for `patience`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17

    @model_validator(mode="after")
    def _fits_together(self) -> "Space":
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self

    def better(self) -> Literal["min", "max"]:
        """In which direction the metric improves."""
        return self.mode or ("min" if self.metric in LOWER_IS_BETTER else "max")

    def cells(self) -> int:
        """Combinations of the grids; 1 without any."""
        listed = [domain for domain in self.search.values() if domain.grid or self.searcher == "grid"]
        return math.prod(len(domain.options() or domain.factors()) for domain in listed)

    def has_default(self) -> bool:
        """Whether trial 0 is the config as it is, and not drawn."""
        return self.include_default and self.scheduler.kind != "population" and self.searcher != "tpe"

    def count(self) -> int:
        """Number of trials."""
        return self.trials or (self.cells() + self.has_default() if self.searcher == "grid" else 16)

    def drawn(self, number: int) -> dict[str, Any]:
        """The draws of a trial of a random or grid search; empty for the default."""
        place = number - self.has_default()
        return {} if place < 0 else self.draw(_Seeded(self, place))

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        """Draws for every field, in the order of the file."""
        found: dict[str, Any] = {}
        for field, domain in self.search.items():
            found |= domain.draw(field, chooser)
        return found

    def values(self, draws: Draws) -> dict[str, Any]:
        """Field -> value that follows from the draws; nothing from no draws."""
        if not any(name in draws for field in self.search for name in (field, field + TIMES)):
            return {}
        found = {field: draws[field] for field in self.search if field in draws}
        for field, domain in self.search.items():
            if domain.of is not None:
                product = found[domain.of] * draws[field + TIMES]
                found[field] = int(product) if float(product).is_integer() else product
        return {field: found[field] for field in self.search}

    def as_draws(self, config: Config) -> dict[str, Any] | None:
        """The draws that give the config as it is; None if the space does not contain it."""
        there = flatten(config)
        found: dict[str, Any] = {}
        for field, domain in self.search.items():
            value: Any = there.get(field)
            if domain.of is not None:
                factor = next((f for f in domain.factors() if there[domain.of] * f == value), None)
                found[field + TIMES] = factor
            elif options := domain.options():
                found[field] = value if value in options else None
            else:
                low, high = domain.extremes()
                found[field] = value if isinstance(value, int | float) and low <= value <= high else None
        return None if any(value is None for value in found.values()) else found


def _contradictions(space: Space) -> Iterator[str]:
    kind = space.scheduler.kind
    for field, domain in space.search.items():
        if domain.of is not None and (domain.of not in space.search or space.search[domain.of].of is not None):
            yield f"search.{field}: of: {domain.of} is not searched by itself"
        if domain.of is not None and any(not isinstance(v, int | float) for v in space.search[domain.of].extremes()):
            yield f"search.{field}: of: {domain.of} has values that are not numbers"
        if domain.grid and space.searcher == "tpe":
            yield f"search.{field}: the tpe searcher has no grid; use choice"
        if space.searcher == "grid" and domain.of is None and not domain.options():
            yield f"search.{field}: a grid search needs choice or grid, a range has no end of values"
        if kind == "population" and not field.startswith("train."):
            yield f"search.{field}: a population shares everything but train.*: its members take over others' adapters"
    if kind == "population" and space.searcher != "random":
        yield "scheduler.kind: population needs searcher: random"
    if space.searcher == "grid" and space.trials and space.trials < space.cells():
        yield f"trials: {space.trials} is less than the grid's {space.cells()} combinations; leave it out for all"


class _Seeded:
    """Draws that follow from the space's seed and the number of the trial."""

    def __init__(self, space: Space, place: int) -> None:
        self.space, self.rest = space, place % space.cells()
        self.random = np.random.default_rng([space.seed, place])

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`; of a grid the one whose turn it is."""
        domain = self.space.search[name.removesuffix(TIMES)]
        if domain.grid or self.space.searcher == "grid":
            self.rest, place = divmod(self.rest, len(options))
            return options[place]
        return options[int(self.random.integers(len(options)))]

    def number(self, name: str, low: float, high: float, log: bool, step: float | None) -> float:
        """A number from low to high."""
        if step is not None:
            return low + step * int(self.random.integers(math.floor((high - low) / step + 1e-9) + 1))
        if log:
            return _digits(math.exp(self.random.uniform(math.log(low), math.log(high))), low, high)
        return _digits(float(self.random.uniform(low, high)), low, high)


def _digits(value: float, low: float, high: float) -> float:
    """Four digits are enough, and a person can read them."""
    return min(max(float(f"{value:.4g}"), low), high)


def _whole(value: float, quniform: tuple[float, float, float] | None) -> Any:
    """Steps of whole numbers give whole numbers: a rank is 16, not 16.0."""
    whole = quniform is not None and all(float(part).is_integer() for part in (quniform[0], quniform[2]))
    return int(value) if whole else value


def suggest(space: Space, trial: Any) -> dict[str, Any]:
    """Draws made by an Optuna trial."""
    return space.draw(_Suggested(trial))


class _Suggested:
    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`."""
        return self.trial.suggest_categorical(name, list(options))

    def number(self, name: str, low: float, high: float, log: bool, step: float | None) -> float:
        """A number from low to high."""
        return float(self.trial.suggest_float(name, low, high, log=log, step=step))
