"""A space file: what a search varies, how it is searched, and when it ends.

    search:
      adapter.rank: {choice: [8, 16, 32]}
      adapter.alpha: {of: adapter.rank, times: [1, 2]}      # depends on another field
      train.lr: {loguniform: [1.0e-4, 2.0e-3]}
    metric: eval/loss

A trial's values are a function of its *draws*: field -> drawn value, and `FIELD:times` -> drawn factor. Random and grid
searches draw with a generator seeded by (seed, number of the trial). So a resumed search has the same trials.
"""

import itertools
import math
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from olora_ray.common.text import plural
from olora_ray.config.load import at, override
from olora_ray.config.schema import Config
from olora_ray.config.section import PositiveInt, Section

# `FIELD:times` is the draw of the factor for a field with `of`.
TIMES = ":times"
# Returned by `Domain.draw_of` for a value that the domain does not have. None cannot say this: it is a valid value.
MISSING = object()


class Chooser(Protocol):
    """The source of a trial's draws: the searchers differ in this only."""

    def choice(self, name: str, options: tuple[Any, ...]) -> Any: ...

    def number(self, name: str, domain: "Domain") -> Any: ...


# An int or float; strict, so that a text like '1e-3' is refused.
Number = Annotated[float, Field(strict=True)]
Listed = Annotated[tuple[Any, ...], Field(min_length=1)]


class Domain(Section):
    """The values of one field; exactly one of choice, grid, uniform, loguniform, quniform, of."""

    choice: Listed | None = None
    """One of these values."""
    grid: Listed | None = None
    """Each of these values in turn, combined with every value of the other grids."""
    uniform: tuple[Number, Number] | None = None
    """[low, high]: a number between them."""
    loguniform: tuple[Number, Number] | None = None
    """[low, high]: a number between them whose logarithm is uniform."""
    quniform: tuple[Number, Number, Number] | None = None
    """[low, high, step]: low, low + step, low + 2 step, ..., at most high."""
    of: str | None = None
    """Name of another searched field; the value is that field's value times `times`."""
    times: Number | Annotated[tuple[Number, ...], Field(min_length=1)] = 1.0
    """Factor for `of`, or a list of factors of which one is drawn."""

    @model_validator(mode="after")
    def _one_form(self) -> "Domain":
        forms = [name for name in FORMS if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"needs exactly one of {', '.join(FORMS)}")
        for problem in _problems(self, forms[0]):
            raise ValueError(problem)
        return self

    def options(self) -> tuple[Any, ...]:
        return self.choice or self.grid or ()

    def interval(self) -> tuple[float, float] | None:
        bounds = self.uniform or self.loguniform or self.quniform
        return (bounds[0], bounds[1]) if bounds else None

    def steps(self) -> int:
        if self.quniform is None:
            return 0
        low, high, step = self.quniform
        return math.floor((high - low) / step + 1e-9) + 1

    def at(self, position: int) -> Any:
        """Return the value of a quniform after `position` steps; an int if low and step are whole numbers."""
        assert self.quniform is not None
        low, _, step = self.quniform
        if float(low).is_integer() and float(step).is_integer():
            return int(low) + position * int(step)
        return float(f"{low + position * step:.12g}")  # 0.3, not 0.30000000000000004

    def extremes(self) -> tuple[Any, ...]:
        """Return every listed value, or both ends of a range; empty for `of`."""
        if self.quniform:
            return self.at(0), self.at(self.steps() - 1)
        return self.options() or self.interval() or ()

    def draw(self, field: str, chooser: Chooser) -> dict[str, Any]:
        if self.of is not None:
            return {field + TIMES: chooser.choice(field + TIMES, self.factors())}
        if options := self.options():
            return {field: chooser.choice(field, options)}
        return {field: chooser.number(field, self)}

    def draw_of(self, value: Any) -> Any:
        """Return the draw that gives `value`, for a field without `of`; MISSING if there is none."""
        if options := self.options():
            return value if value in options else MISSING
        interval = self.interval()
        assert interval is not None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not interval[0] <= value <= interval[1]
        ):
            return MISSING
        if self.quniform is None:
            return value
        step = round((value - self.quniform[0]) / self.quniform[2])
        return (
            self.at(step)
            if step < self.steps() and math.isclose(self.at(step), value, abs_tol=0)
            else MISSING
        )

    def factors(self) -> tuple[float, ...]:
        return self.times if isinstance(self.times, tuple) else (self.times,)


FORMS = ("choice", "grid", "uniform", "loguniform", "quniform", "of")


def rounded(value: float, low: float, high: float) -> float:
    """Return the number with four digits that tell it from its neighbours in the range, for readability."""
    beside = max(abs(low), abs(high)) / (high - low)  # large for a narrow range far from 0
    digits = min(17, 4 + max(0, math.floor(math.log10(beside))))
    return min(max(float(f"{value:.{digits}g}"), low), high)


def _problems(domain: Domain, form: str) -> Iterator[str]:
    if domain.of is None and "times" in domain.model_fields_set:
        yield "times: set without of; set of too, or leave times out"
    for name, values in ((form, domain.options()), ("times", domain.factors())):
        seen = set[str]()
        for value in values:
            # 8 and 8.0 are the same training, 1 and true are not.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            same = repr(float(value) if number else value)
            if same in seen:
                yield f"{name} has {value!r} twice; leave one out"
            seen.add(same)
    if interval := domain.interval():
        if not interval[0] < interval[1]:
            yield f"{form} {list(interval)} is an empty range; the first number must be smaller than the second"
        if form == "loguniform" and interval[0] <= 0:
            yield "loguniform needs numbers greater than 0"
        if domain.quniform and not 0 < domain.quniform[2] <= interval[1] - interval[0]:
            yield f"quniform {list(domain.quniform)}: the step must be positive, and at most high - low"


# Two sources of draws: a generator with a seed, and an Optuna trial.


class Seeded:
    """Draws that follow from a seed alone. The fields `in_turn` take their listed values one after another."""

    def __init__(self, seed: tuple[int, ...], turn: int = 0, in_turn: Container[str] = ()) -> None:
        # `turn` counts the combinations of the fields `in_turn`, from 0.
        self.random, self.rest, self.in_turn = np.random.default_rng(seed), turn, in_turn

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        if name.removesuffix(TIMES) in self.in_turn:
            self.rest, position = divmod(self.rest, len(options))
            return options[position]
        return options[int(self.random.integers(len(options)))]

    def number(self, name: str, domain: Domain) -> Any:
        if domain.quniform:
            return domain.at(int(self.random.integers(domain.steps())))
        low, high = domain.extremes()
        if domain.loguniform:
            return rounded(math.exp(self.random.uniform(math.log(low), math.log(high))), low, high)
        return rounded(float(self.random.uniform(low, high)), low, high)


class Suggested:
    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        return self.trial.suggest_categorical(name, list(options))

    def number(self, name: str, domain: Domain) -> Any:
        low, high = domain.extremes()
        if domain.quniform is None:
            return self.trial.suggest_float(name, low, high, log=domain.loguniform is not None)
        step = domain.quniform[2]
        if isinstance(low, int):
            return self.trial.suggest_int(name, low, high, step=int(step))
        return self.trial.suggest_float(name, low, high, step=step)


Draws = Mapping[str, Any]
# Trials that vary only these can share one base model and its data.
SAME_BASE = ("adapter.", "train.")
LOWER_IS_BETTER = ("eval/loss", "eval/perplexity", "train/loss")
# Of these, trials that vary one of the following have training losses of other rows, or with other dropout.
OTHER_LOSSES = ("adapter.dropout", "train.epochs", "train.global_batch", "train.steps")
# Ray Tune keeps all trials of a search in memory and in its state, and each trial is a training.
MOST_TRIALS = 10_000


class Scheduler(Section):
    """The rule that stops trials early. It compares trials at the same share of their own steps.

    asha compares training losses if all trials see the same rows in the same steps, otherwise evaluations.
    """

    kind: Literal["asha", "none"] = "asha"
    """asha: successive halving; none: stop no trial."""
    grace: PositiveInt | None = None
    """asha: steps before a trial may be stopped; null: train.eval_every (on the same rows: 1/16)."""
    reduction: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 4.0
    """asha: at each rung, one trial of this many continues."""

    @model_validator(mode="after")
    def _only_its_settings(self) -> "Scheduler":
        for name in sorted(self.model_fields_set - {"kind"} if self.kind == "none" else ()):
            raise ValueError(f"{name}: not used by kind: {self.kind}; leave it out")
        return self


class Space(Section):
    """All settings of a search."""

    search: Annotated[dict[str, Domain], Field(min_length=1)]
    """Dotted config field -> its values."""
    set: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Changes of the config that all trials share, e.g. {train.steps: 40}."""
    metric: str = "eval/loss"
    """eval/loss, eval/perplexity, train/loss, or score/NAME of the config's scorer (measured at the end only)."""
    mode: Literal["min", "max"] | None = None
    """null: min for losses and perplexity, max for scores."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """random: random values; grid: every combination once; tpe: Optuna's tree-structured Parzen estimator."""
    scheduler: Scheduler = Scheduler()
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    """Number of trials, including the unchanged config (include_default); null: 16, or every combination of a grid."""
    concurrency: PositiveInt | None = None
    """Trials that run at the same time; null: as many as the cluster has room for."""
    trials_per_worker: PositiveInt = 1
    """Adapters that one worker trains side by side on one copy of the base model."""
    include_default: bool = True
    """true: the first of the trials is the unchanged config."""
    time_budget: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Seconds after which the search ends, over all attempts of an interrupted search."""
    patience: PositiveInt | None = None
    """End the search after this many trials in a row without a better value."""
    min_improvement: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """A value must be better by more than this to count for `patience`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17

    @model_validator(mode="after")
    def _fits_together(self) -> "Space":
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self

    def better(self) -> Literal["min", "max"]:
        return self.mode or ("min" if self.metric in LOWER_IS_BETTER else "max")

    def paired(self) -> bool:
        """True if trials are compared by their training losses, because all of them see the same rows in each step."""
        comparable = all(
            field.startswith(SAME_BASE) and field not in OTHER_LOSSES for field in self.search
        )
        return self.scheduler.kind == "asha" and self.metric in LOWER_IS_BETTER and comparable

    def cells(self) -> int:
        """Return the number of combinations of the grids; 1 without grids."""
        listed = [
            domain for domain in self.search.values() if domain.grid or self.searcher == "grid"
        ]
        return math.prod(len(domain.options() or domain.factors()) for domain in listed)

    def has_default(self) -> bool:
        """True if trial 0 is the unchanged config."""
        return self.include_default and self.searcher != "tpe"

    def count(self) -> int:
        return self.trials or (self.cells() + self.has_default() if self.searcher == "grid" else 16)

    def in_words(self) -> str:
        return (
            plural(self.count(), "trial")
            + ", of which trial 0 is the unchanged config" * self.has_default()
        )

    def own_name(self, number: int) -> str | None:
        """Return the name of a trial's folder if it does not follow from the number."""
        return None

    def drawn(self, number: int) -> dict[str, Any]:
        """Return the draws of a trial of a random or grid search; empty for the default."""
        position = number - self.has_default()
        if position < 0:
            return {}
        in_turn = {
            name for name, domain in self.search.items() if domain.grid or self.searcher == "grid"
        }
        return self.draw(Seeded((self.seed, position), position % self.cells(), in_turn))

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        draws: dict[str, Any] = {}
        for field, domain in self.search.items():
            draws |= domain.draw(field, chooser)
        return draws

    def draw_names(self) -> list[str]:
        return [
            field if domain.of is None else field + TIMES for field, domain in self.search.items()
        ]

    def values(self, draws: Draws) -> dict[str, Any]:
        if not any(name in draws for name in self.draw_names()):
            return {}
        values = {
            field: _settled(domain, draws[field])
            for field, domain in self.search.items()
            if field in draws
        }
        for field, domain in self.search.items():
            if domain.of is not None:
                values[field] = multiple(values[domain.of], draws[field + TIMES])
        return {field: values[field] for field in self.search}

    def possible(self, field: str, configured: float) -> list[Any]:
        """Return the extreme values of a numeric field; `configured` is the value in the config."""
        domain = self.search.get(field)
        if domain is None:
            return [configured]
        base = domain if domain.of is None else self.search[domain.of]
        # Without `of` the only factor is 1.
        values = [
            multiple(value, factor) for value in base.extremes() for factor in domain.factors()
        ]
        return [*values, configured] if self.has_default() else values

    def listed(self, field: str, configured: Any) -> list[Any]:
        """Return the values of a field without a range; `configured` is the value in the config."""
        domain = self.search.get(field)
        if domain is None:
            return [configured]
        return [*domain.options(), *([configured] if self.has_default() else [])]

    def is_range(self, field: str) -> bool:
        domain = self.search.get(field)
        base = self.search[domain.of] if domain and domain.of else domain
        return base is not None and base.interval() is not None

    def as_draws(self, config: Config) -> dict[str, Any] | None:
        """Return the draws that give the unchanged config; None if the space does not contain it."""
        draws: dict[str, Any] = {}
        for field, domain in self.search.items():
            value: Any = at(config, field, MISSING)
            if domain.of is not None:
                base = at(config, domain.of)
                # A field that is null (train.clip) has no multiple.
                fitting = (
                    factor
                    for factor in domain.factors()
                    if base is not None and base * factor == value
                )
                draws[field + TIMES] = next(fitting, MISSING)
            else:
                draws[field] = _draw_of(domain, config, field, value)
        return None if any(value is MISSING for value in draws.values()) else draws


def _draw_of(domain: Domain, config: Config, field: str, value: Any) -> Any:
    # An option that is a section may leave out what is at its default. So it is compared after the config has completed
    # it.
    parts = value if isinstance(value, list) else [value]
    if not domain.options() or not any(isinstance(part, dict) for part in parts):
        return domain.draw_of(value)
    same = (
        option
        for option in domain.options()
        if at(override(config, {field: option}), field) == value
    )
    return next(same, MISSING)


def multiple(base: float, factor: float) -> float:
    """Return base times factor; a whole result is an int, because fields such as adapter.rank need one."""
    product = base * factor
    return int(product) if float(product).is_integer() else product


def _settled(domain: Domain, value: Any) -> Any:
    # Optuna gives 16.0, or 0.30000000000000004, for a step of a quniform.
    settled = domain.draw_of(value) if domain.quniform else value
    return value if settled is MISSING else settled


def _contradictions(space: Space) -> Iterator[str]:
    yield from _field_problems(space)
    for field, domain in space.search.items():
        if domain.of is not None:
            yield from _base_problems(space, field, domain.of)
        if domain.grid and space.searcher == "tpe":
            yield f"search.{field}: searcher: tpe has no grid; use choice"
        if space.searcher == "grid" and domain.of is None and not domain.options():
            yield f"search.{field}: searcher: grid needs listed values; use choice or grid instead of a range"
    if space.mode == "max" and space.metric in LOWER_IS_BETTER:
        yield f"mode: max searches for the worst {space.metric}; leave it out"
    if space.searcher == "grid":
        yield from _grid_problems(space)


def _field_problems(space: Space) -> Iterator[str]:
    settings = [("search", field) for field in space.search] + [
        ("set", field) for field in space.set
    ]
    for section, field in settings:
        if not all(field.split(".")):
            yield f"{section}: {field!r} is not a config field; olora-ray finetune --help all lists the fields"
    for (section, field), (other_section, other) in itertools.permutations(settings, 2):
        if other == field or other.startswith(f"{field}."):
            yield f"{other_section}.{other}: {section}.{field} sets it too; leave one out"


def _base_problems(space: Space, field: str, base: str) -> Iterator[str]:
    if base not in space.search or space.search[base].of is not None:
        yield f"search.{field}: of: {base} must be searched too, with values of its own"
    elif any(
        isinstance(value, bool) or not isinstance(value, int | float)
        for value in space.search[base].extremes()
    ):
        yield f"search.{field}: of: {base} has values that are not numbers"


def _grid_problems(space: Space) -> Iterator[str]:
    needed = space.cells() + space.has_default()
    also = ", including the unchanged config" if space.has_default() else ""
    if needed > MOST_TRIALS:
        yield f"search: the grid has {needed:,} combinations{also}, more than {MOST_TRIALS:,}; list fewer values"
    elif space.trials not in (None, needed):
        yield f"trials: {space.trials}, but the grid has {needed} combinations{also}; leave it out to run each once"
