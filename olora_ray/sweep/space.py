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

import itertools
import math
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from olora_ray.config.load import at, override
from olora_ray.config.schema import Config, PositiveInt, Section

TIMES = ":times"
"""`FIELD:times` is the name of the factor that is drawn for a field with `of`."""
MISSING = object()
"""What `Domain.draw_of` returns for a value that the domain does not have; None is a value like others."""


class Chooser(Protocol):
    """Draws values; the searchers differ in this only."""

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`."""

    def number(self, name: str, domain: "Domain") -> Any:
        """A number of the domain's range."""


Number = Annotated[float, Field(strict=True)]
"""An int or float; no text that looks like a number."""
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
    times: Number | Annotated[tuple[Number, ...], Field(min_length=1)] = 1.0
    """Factor for `of`, or a list of factors of which one is drawn."""

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
    for name, values in ((kind, domain.options()), ("times", domain.factors())):
        seen = set[str]()
        for value in values:
            # 8 and 8.0 are the same training, 1 and true are not.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            same = repr(float(value) if number else value)
            if same in seen:
                yield f"{name} has {value!r} twice"
            seen.add(same)
    if interval := domain.interval():
        if not interval[0] < interval[1]:
            yield f"{kind} {list(interval)} is an empty range: the first number must be the smaller one"
        if kind == "loguniform" and interval[0] <= 0:
            yield "loguniform needs numbers greater than 0"
        if domain.quniform and not 0 < domain.quniform[2] <= interval[1] - interval[0]:
            yield f"quniform {list(domain.quniform)}: the step must be positive and fit between the others"


# What draws the values of a trial: numbers that follow from a seed, or an Optuna trial.


class Seeded:
    """Draws that follow from a seed alone; what is listed `in_turn` is taken one by one, not by chance."""

    def __init__(self, seed: tuple[int, ...], turn: int = 0, in_turn: Container[str] = ()) -> None:
        """`turn` counts the combinations of the fields `in_turn`, from 0."""
        self.random, self.rest, self.in_turn = np.random.default_rng(seed), turn, in_turn

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`; of a grid the one whose turn it is."""
        if name.removesuffix(TIMES) in self.in_turn:
            self.rest, place = divmod(self.rest, len(options))
            return options[place]
        return options[int(self.random.integers(len(options)))]

    def number(self, name: str, domain: Domain) -> Any:
        """A number of the domain's range."""
        if domain.quniform:
            return domain.at(int(self.random.integers(domain.steps())))
        low, high = domain.extremes()
        if domain.loguniform:
            return rounded(math.exp(self.random.uniform(math.log(low), math.log(high))), low, high)
        return rounded(float(self.random.uniform(low, high)), low, high)


class Suggested:
    """Draws made by an Optuna trial."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        """One of `options`."""
        return self.trial.suggest_categorical(name, list(options))

    def number(self, name: str, domain: Domain) -> Any:
        """A number of the domain's range."""
        low, high = domain.extremes()
        if domain.quniform is None:
            return self.trial.suggest_float(name, low, high, log=domain.loguniform is not None)
        step = domain.quniform[2]
        if isinstance(low, int):
            return self.trial.suggest_int(name, low, high, step=int(step))
        return self.trial.suggest_float(name, low, high, step=step)


Draws = Mapping[str, Any]
SAME_BASE = ("adapter.", "train.")
"""What adapters that share one base model may differ in."""
LOWER_IS_BETTER = ("eval/loss", "eval/perplexity", "train/loss")
MOST_TRIALS = 10_000
"""Ray Tune keeps all trials of a search in its memory and state, and each is a training."""
LENGTHS = (
    "train.steps",
    "train.epochs",
    "train.global_batch",
    "train.eval_every",
    "train.checkpoint_every",
    "train.early_stop",
    "train.keep",
    "train.start",
)
"""What all members of a population have in common: they take over each other's state at the same step."""


class Scheduler(Section):
    """Which trials are stopped before their end. Its time is the share of a trial's own steps that is done."""

    kind: Literal["asha", "median", "population", "none"] = "asha"
    """asha: successive halving; median: below the others' median; population: PBT; none: all run to the end."""
    grace: PositiveInt | None = None
    """asha, median: steps of the config that every trial may do, a longer one as many more; null: train.eval_every."""
    reduction: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 3.0
    """asha: of so many trials that come to a rung one continues."""
    interval: PositiveInt | None = None
    """population: steps between two looks at the others; null: train.eval_every."""

    @model_validator(mode="after")
    def _for_its_kind(self) -> "Scheduler":
        used = {"asha": {"grace", "reduction"}, "median": {"grace"}, "population": {"interval"}, "none": set[str]()}
        for name in sorted(self.model_fields_set - used[self.kind] - {"kind"}):
            raise ValueError(f"{name}: {self.kind} has no such setting; leave it out")
        return self


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
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    """Number of trials, the default one included; null: 16, or every combination of a grid."""
    concurrency: PositiveInt | None = None
    """Trials at the same time; null: as many as the cluster has room for."""
    trials_per_worker: PositiveInt = 1
    """Adapters that one worker trains side by side on one copy of the base model."""
    include_default: bool = True
    """Whether the config as it is is one of the trials, the first."""
    time_budget: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Seconds after which no trial continues, over all attempts of an interrupted search."""
    patience: PositiveInt | None = None
    """End the search when so many trials in a row have ended without a better value."""
    min_improvement: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
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

    def follows_from_numbers(self) -> bool:
        """Whether a trial's values follow from its number, and not from what others have measured."""
        return self.searcher != "tpe" and self.scheduler.kind != "population"

    def count(self) -> int:
        """Number of trials."""
        return self.trials or (self.cells() + self.has_default() if self.searcher == "grid" else 16)

    def drawn(self, number: int) -> dict[str, Any]:
        """The draws of a trial of a random or grid search; empty for the default."""
        place = number - self.has_default()
        if place < 0:
            return {}
        in_turn = {name for name, domain in self.search.items() if domain.grid or self.searcher == "grid"}
        return self.draw(Seeded((self.seed, place), place % self.cells(), in_turn))

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        """Draws for every field, in the order of the file."""
        found: dict[str, Any] = {}
        for field, domain in self.search.items():
            found |= domain.draw(field, chooser)
        return found

    def draw_names(self) -> list[str]:
        """The keys of the draws."""
        return [field if domain.of is None else field + TIMES for field, domain in self.search.items()]

    def values(self, draws: Draws) -> dict[str, Any]:
        """Field -> value that follows from the draws; nothing from no draws."""
        if not any(name in draws for name in self.draw_names()):
            return {}
        found = {field: _settled(domain, draws[field]) for field, domain in self.search.items() if field in draws}
        for field, domain in self.search.items():
            if domain.of is not None:
                found[field] = multiple(found[domain.of], draws[field + TIMES])
        return {field: found[field] for field in self.search}

    def possible(self, field: str, configured: float) -> list[Any]:
        """The ends of the values that a field of numbers may have; `configured` is that of the config."""
        domain = self.search.get(field)
        if domain is None:
            return [configured]
        base = domain if domain.of is None else self.search[domain.of]
        found = [multiple(value, factor) for value in base.extremes() for factor in domain.factors()]  # else times 1
        return [*found, configured] if self.has_default() else found

    def listed(self, field: str, configured: Any) -> list[Any]:
        """The values that a field without a range may have; `configured` is that of the config."""
        domain = self.search.get(field)
        if domain is None:
            return [configured]
        return [*domain.options(), *([configured] if self.has_default() else [])]

    def is_range(self, field: str) -> bool:
        """Whether the values of a field come from a range, or are multiples of such."""
        domain = self.search.get(field)
        base = self.search[domain.of] if domain and domain.of else domain
        return base is not None and base.interval() is not None

    def as_draws(self, config: Config) -> dict[str, Any] | None:
        """The draws that give the config as it is; None if the space does not contain it."""
        found: dict[str, Any] = {}
        for field, domain in self.search.items():
            value: Any = at(config, field, MISSING)
            if domain.of is not None:
                base = at(config, domain.of)
                # A base that is null (train.clip) has no multiple.
                fitting = (factor for factor in domain.factors() if base is not None and base * factor == value)
                found[field + TIMES] = next(fitting, MISSING)
            else:
                found[field] = _draw_of(domain, config, field, value)
        return None if any(value is MISSING for value in found.values()) else found


def _draw_of(domain: Domain, config: Config, field: str, value: Any) -> Any:
    """The draw that gives `value`, which the config has; MISSING if there is none.

    Of a section or a list of mappings an option need not have what is left at its default.
    """
    parts = value if isinstance(value, list) else [value]
    if not domain.options() or not any(isinstance(part, dict) for part in parts):
        return domain.draw_of(value)
    same = (option for option in domain.options() if at(override(config, {field: option}), field) == value)
    return next(same, MISSING)


def multiple(base: float, factor: float) -> float:
    """The value of a field with `of`: a whole number stays one, 16 times 0.5 is 8."""
    product = base * factor
    return int(product) if float(product).is_integer() else product


def _settled(domain: Domain, value: Any) -> Any:
    """A drawn value as it is used: Optuna gives 16.0 or 0.30000000000000004 for a step of a quniform."""
    found = domain.draw_of(value) if domain.quniform else value
    return value if found is MISSING else found


def _contradictions(space: Space) -> Iterator[str]:
    yield from _field_problems(space)
    for field, domain in space.search.items():
        if domain.of is not None:
            yield from _base_problems(space, field, domain.of)
        if domain.grid and space.searcher == "tpe":
            yield f"search.{field}: the tpe searcher has no grid; use choice"
        if space.searcher == "grid" and domain.of is None and not domain.options():
            yield f"search.{field}: a grid search needs choice or grid, a range has no end of values"
    if space.scheduler.kind == "population":
        yield from _population_problems(space)
    if space.mode == "max" and space.metric in LOWER_IS_BETTER:
        yield f"mode: max would search for the worst {space.metric}; leave it out"
    if space.searcher == "grid":
        yield from _grid_problems(space)


def _field_problems(space: Space) -> Iterator[str]:
    """Two places that set the same field, or a part of it."""
    places = [("search", field) for field in space.search] + [("set", field) for field in space.set]
    for place, field in places:
        if not all(field.split(".")):
            yield f"{place}: {field!r} is no field of a config"
    for (place, field), (other_place, other) in itertools.permutations(places, 2):
        if other == field or other.startswith(f"{field}."):
            yield f"{other_place}.{other}: {place}.{field} sets it too; leave one out"


def _base_problems(space: Space, field: str, base: str) -> Iterator[str]:
    if base not in space.search or space.search[base].of is not None:
        yield f"search.{field}: of: {base} is not searched by itself"
    elif any(isinstance(value, bool) or not isinstance(value, int | float) for value in space.search[base].extremes()):
        yield f"search.{field}: of: {base} has values that are not numbers"


def _population_problems(space: Space) -> Iterator[str]:
    for field, domain in space.search.items():
        if not field.startswith("train."):
            yield f"search.{field}: a population shares everything but train.*: its members take over others' adapters"
        if field in LENGTHS:
            yield f"search.{field}: a population's members take over each other at the same step; put it under set"
        if domain.steps() > 10_000:  # Tune keeps them as a list
            yield f"search.{field}: quniform has more than 10,000 values for a population; use uniform"
    if space.searcher != "random":
        yield "scheduler.kind: population needs searcher: random"


def _grid_problems(space: Space) -> Iterator[str]:
    whole = space.cells() + space.has_default()
    also = ", the unchanged config included" if space.has_default() else ""
    if whole > MOST_TRIALS:
        yield f"search: the grid has {whole:,} combinations{also}, more than {MOST_TRIALS:,}; leave values out"
    elif space.trials and space.trials < whole:
        yield f"trials: {space.trials} is less than the grid's {whole} combinations{also}; leave it out for all"
    elif space.trials and space.trials > whole:
        yield f"trials: {space.trials} is more than the grid's {whole} combinations{also}; leave it out for all"
