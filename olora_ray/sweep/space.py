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
from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal

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

    @model_validator(mode="before")
    @classmethod
    def _no_bare_list(cls, given: object) -> object:
        if isinstance(given, list):
            raise ValueError(f"a list; write {{choice: {given}}} to draw one of them")
        return given

    @model_validator(mode="after")
    def _one_form(self) -> "Domain":
        forms = [name for name in FORMS if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"needs exactly one of {', '.join(FORMS)}")
        form = forms[0]
        if self.of is None and "times" in self.model_fields_set:
            raise ValueError("times: set without of; set of too, or leave times out")
        for name, values in ((form, self.options()), ("times", self.factors())):
            seen = set[str]()
            for value in values:
                # 8 and 8.0 are the same training, 1 and true are not.
                same = repr(float(value) if _is_number(value) else value)
                if same in seen:
                    raise ValueError(f"{name} has {value!r} twice; leave one out")
                seen.add(same)
        interval = self.interval()
        if interval is None:
            return self
        low, high = interval
        if not low < high:
            raise ValueError(
                f"{form} {[low, high]} is an empty range; the first number must be smaller than the second"
            )
        if self.loguniform and low <= 0:
            raise ValueError("loguniform needs numbers greater than 0")
        if self.quniform and not 0 < self.quniform[2] <= high - low:
            raise ValueError(
                f"quniform {list(self.quniform)}: the step must be positive, and at most high - low"
            )
        return self

    def options(self) -> tuple[Any, ...]:
        return self.choice or self.grid or ()

    def interval(self) -> tuple[float, float] | None:
        bounds = self.uniform or self.loguniform or self.quniform
        if bounds is None:
            return None
        return bounds[0], bounds[1]

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

    def draw_name(self, field: str) -> str:
        return field if self.of is None else field + TIMES

    def draw(self, name: str, chooser: "Seeded | Suggested") -> Any:
        if self.interval() is not None:
            return chooser.number(name, self)
        return chooser.choice(name, self.options() or self.factors())

    def draw_of(self, value: Any) -> Any:
        """Return the draw that gives `value`, for a field without `of`; MISSING if there is none."""
        interval = self.interval()
        if interval is None:
            return value if value in self.options() else MISSING
        low, high = interval
        if not _is_number(value) or not low <= value <= high:
            return MISSING
        if self.quniform is None:
            return value
        step = round((value - low) / self.quniform[2])
        if step < self.steps() and math.isclose(self.at(step), value, abs_tol=0):
            return self.at(step)
        return MISSING

    def factors(self) -> tuple[float, ...]:
        if isinstance(self.times, tuple):
            return self.times
        return (self.times,)


FORMS = ("choice", "grid", "uniform", "loguniform", "quniform", "of")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rounded(value: float, low: float, high: float) -> float:
    """Return the number with four digits that tell it from its neighbours in the range, for readability."""
    beside = max(abs(low), abs(high)) / (high - low)  # large for a narrow range far from 0
    digits = min(17, 4 + max(0, math.floor(math.log10(beside))))
    return min(max(float(f"{value:.{digits}g}"), low), high)


# Two sources of draws: a generator with a seed, and an Optuna trial.


class Seeded:
    """Draws that follow from a seed alone. The fields `in_turn` take their listed values one after another."""

    def __init__(self, seed: tuple[int, ...], turn: int = 0, in_turn: Container[str] = ()) -> None:
        # `turn` counts the combinations of the fields `in_turn`, from 0.
        self.random = np.random.default_rng(seed)
        self.rest = turn
        self.in_turn = in_turn

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
Values = dict[str, Any]
"""Dotted config field, or the name of a draw -> its value."""
# Trials that vary only these can share one base model and its data.
SAME_BASE = ("adapter.", "train.")
LOWER_IS_BETTER = (
    "eval/loss",
    "eval/perplexity",
    "eval/objective",
    "eval/pairs/loss",
    "train/loss",
)
# The metrics that a training loss of the same rows stands for.
OF_TOKENS = ("eval/loss", "eval/perplexity", "train/loss")
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
        unused = sorted(self.model_fields_set - {"kind"})
        if self.kind == "none" and unused:
            raise ValueError(f"{unused[0]}: not used by kind: none; leave it out")
        return self


class Space(Section):
    """All settings of a search."""

    search: Annotated[dict[str, Domain], Field(min_length=1)]
    """Dotted config field -> its values."""
    set: Annotated[Values, Field(default_factory=dict)]
    """Changes of the config that all trials share, e.g. {train.steps: 40}."""
    metric: str = "eval/loss"
    """eval/loss, eval/perplexity, train/loss, or score/NAME of the config's scorer (measured at the end only). With
    preference pairs also eval/objective, the default there, and eval/pairs/NAME."""
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
        _check_fields(self)
        for field, domain in self.search.items():
            if domain.of is not None:
                base = self.search.get(domain.of)
                if base is None or base.of is not None:
                    raise ValueError(
                        f"search.{field}: of: {domain.of} must be searched too, with values of its own"
                    )
                if not all(_is_number(value) for value in base.extremes()):
                    raise ValueError(
                        f"search.{field}: of: {domain.of} has values that are not numbers"
                    )
            if domain.grid and self.searcher == "tpe":
                raise ValueError(f"search.{field}: searcher: tpe has no grid; use choice")
            if domain.interval() and self.searcher == "grid":
                raise ValueError(
                    f"search.{field}: searcher: grid needs listed values; use choice or grid instead of a range"
                )
        if self.mode == "max" and self.metric in LOWER_IS_BETTER:
            raise ValueError(f"mode: max searches for the worst {self.metric}; leave it out")
        if self.searcher == "grid":
            _check_grid(self)
        return self

    def better(self) -> Literal["min", "max"]:
        if self.mode is not None:
            return self.mode
        return "min" if self.metric in LOWER_IS_BETTER else "max"

    def paired(self) -> bool:
        """True if trials are compared by their training losses, because all of them see the same rows in each step."""
        comparable = all(
            field.startswith(SAME_BASE) and field not in OTHER_LOSSES for field in self.search
        )
        return self.scheduler.kind == "asha" and self.metric in OF_TOKENS and comparable

    def cells(self) -> int:
        """Return the number of combinations of the grids; 1 without grids."""
        return math.prod(
            len(domain.options() or domain.factors()) for domain in self._in_turn().values()
        )

    def _in_turn(self) -> dict[str, Domain]:
        """Return the fields that take their listed values one after another."""
        return {
            field: domain
            for field, domain in self.search.items()
            if domain.grid or self.searcher == "grid"
        }

    def has_default(self) -> bool:
        """True if trial 0 is the unchanged config."""
        return self.include_default and self.searcher != "tpe"

    def count(self) -> int:
        if self.trials is not None:
            return self.trials
        if self.searcher == "grid":
            return self.cells() + self.has_default()
        return 16

    def in_words(self) -> str:
        words = plural(self.count(), "trial")
        if self.has_default():
            words += ", of which trial 0 is the unchanged config"
        return words

    def own_name(self, number: int) -> str | None:
        """Return the name of a trial's folder if it does not follow from the number."""
        return None

    def drawn(self, number: int) -> Values:
        """Return the draws of a trial of a random or grid search; empty for the default."""
        position = number - self.has_default()
        if position < 0:
            return {}
        return self.draw(Seeded((self.seed, position), position % self.cells(), self._in_turn()))

    def draw(self, chooser: "Seeded | Suggested") -> Values:
        draws: Values = {}
        for field, domain in self.search.items():
            name = domain.draw_name(field)
            draws[name] = domain.draw(name, chooser)
        return draws

    def draw_names(self) -> list[str]:
        return [domain.draw_name(field) for field, domain in self.search.items()]

    def values(self, draws: Draws) -> Values:
        if not any(name in draws for name in self.draw_names()):
            return {}
        values: Values = {}
        for field, domain in self.search.items():
            values[field] = draws[domain.draw_name(field)]  # with `of`: the factor
            if domain.quniform:  # Optuna gives 16.0, or 0.30000000000000004
                settled = domain.draw_of(values[field])
                if settled is not MISSING:
                    values[field] = settled
        for field, domain in self.search.items():
            if domain.of is not None:
                values[field] = multiple(values[domain.of], values[field])
        return values

    def trial_values(self, number: int, draws: Draws) -> Values:
        """Return the values of a trial; empty for the unchanged config."""
        if number == 0 and self.has_default():
            return {}
        return self.values(draws)

    def possible(self, field: str, configured: Any) -> list[Any]:
        """Return the listed values of a field, or the ends of its range; `configured` is the value in the config."""
        domain = self.search.get(field)
        if domain is None:
            return [configured]
        values = list(domain.extremes())
        if domain.of is not None:
            for value in self.search[domain.of].extremes():
                values += [multiple(value, factor) for factor in domain.factors()]
        if self.has_default():
            values.append(configured)
        return values

    def is_range(self, field: str) -> bool:
        domain = self.search.get(field)
        if domain is not None and domain.of is not None:
            domain = self.search[domain.of]
        return domain is not None and domain.interval() is not None

    def as_draws(self, config: Config) -> Values | None:
        """Return the draws that give the unchanged config; None if the space does not contain it."""
        draws: Values = {}
        for field, domain in self.search.items():
            value: Any = at(config, field, MISSING)
            parts = value if isinstance(value, list) else [value]
            if domain.of is not None:
                base = at(config, domain.of)
                # A field that is null (train.clip) has no multiple.
                factors = domain.factors() if _is_number(base) else ()
                draw = next((factor for factor in factors if base * factor == value), MISSING)
            elif any(isinstance(part, dict) for part in parts):
                # An option that is a section may leave out what is at its default. So it is compared after the config
                # has completed it.
                options = domain.options()
                same = (
                    each for each in options if at(override(config, {field: each}), field) == value
                )
                draw = next(same, MISSING)
            else:
                draw = domain.draw_of(value)
            if draw is MISSING:
                return None
            draws[domain.draw_name(field)] = draw
        return draws


def multiple(base: float, factor: float) -> float:
    """Return base times factor; a whole result is an int, because fields such as adapter.rank need one."""
    product = base * factor
    if float(product).is_integer():
        return int(product)
    return product


def _check_fields(space: Space) -> None:
    searched = [("search", field) for field in space.search]
    settings = searched + [("set", field) for field in space.set]
    for section, field in settings:
        if not all(field.split(".")):
            raise ValueError(
                f"{section}: {field!r} is not a config field; olora-ray finetune --help all lists the fields"
            )
    for (section, field), (other_section, other) in itertools.permutations(settings, 2):
        if other == field or other.startswith(f"{field}."):
            raise ValueError(
                f"{other_section}.{other}: {section}.{field} sets it too; leave one out"
            )


def _check_grid(space: Space) -> None:
    needed = space.cells() + space.has_default()
    combinations = " combinations"
    if space.has_default():
        combinations += ", including the unchanged config"
    if needed > MOST_TRIALS:
        raise ValueError(
            f"search: the grid has {needed:,}{combinations}, more than {MOST_TRIALS:,}; list fewer values"
        )
    if space.trials not in (None, needed):
        raise ValueError(
            f"trials: {space.trials}, but the grid has {needed}{combinations}; leave it out to run each once"
        )
