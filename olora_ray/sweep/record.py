"""Records of a search: one per trial, and one of all that ranks them."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Mode = Literal["min", "max"]
Status = Literal["finished", "stopped", "failed", "unfinished"]
"""stopped: by the scheduler, because others did better; unfinished: the search ended before the trial did."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial."""

    number: int
    """Counted from 0, in the order of the search."""
    params: dict[str, Any]
    """Dotted config field -> value; of population-based training the last values."""
    status: Status
    value: float | None = None
    """Best value of the metric so far; None if it was never measured."""
    step: int = 0
    """Optimizer steps done."""
    total: int = 0
    """Steps of its whole training; 0 if that is not known."""
    curve: tuple[tuple[int, float], ...] = ()
    """(step, metric), in order of steps."""
    seconds: float = 0.0
    """From start to end, over all attempts."""
    first_step: float | None = None
    """Seconds from the start of the trial to the end of its first step."""
    spared: float = 0.0
    """Seconds of preparation and initialisation that the search did once and this trial not again."""
    reason: str = ""
    """Reason of a failure or a stop."""
    folder: str = ""
    """The trial's run folder."""
    mlflow_run: str = ""

    def measured(self) -> bool:
        """Whether there is a value to rank it by; NaN and infinity are none."""
        return self.value is not None and math.isfinite(self.value)


@dataclass(frozen=True)
class SearchRecord:
    """A whole search."""

    name: str
    metric: str
    mode: Mode
    searcher: str
    scheduler: str
    seconds: float
    trials: tuple[TrialRecord, ...]
    fields: tuple[str, ...]
    """Dotted config fields that are searched, in the order of the space file."""
    default: int | None = None
    """Number of the trial that has the config as it is."""
    notes: tuple[str, ...] = field(default=())
    """Sentences about the search as a whole, e.g. why it ended early."""

    def ranked(self) -> list[TrialRecord]:
        """The trials that have a value, the best first; those that failed come last, whatever they had measured."""
        sign = 1 if self.mode == "min" else -1
        measured = [trial for trial in self.trials if trial.measured()]
        return sorted(measured, key=lambda trial: (trial.status == "failed", sign * (trial.value or 0.0), trial.number))

    def ordered(self) -> list[TrialRecord]:
        """All trials: the ranked, then those without a value in the order of the search."""
        rest = [trial for trial in self.trials if not trial.measured()]
        return self.ranked() + sorted(rest, key=lambda trial: trial.number)

    def best(self) -> TrialRecord | None:
        """The trial with the best value, of those that did not fail if there is one."""
        return next(iter(self.ranked()), None)

    def thinned(self, most: int) -> "SearchRecord":
        """The same search with at most `most` trials, evenly from the best to the worst; the default stays."""
        last = len(self.trials) - 1
        if last < most:
            return self
        ordered = self.ordered()
        kept = {ordered[round(place * last / (most - 1))].number for place in range(most)}
        if self.default is not None and self.default not in kept:
            kept = {*sorted(kept - {ordered[0].number})[1:], ordered[0].number, self.default}
        return replace(self, trials=tuple(trial for trial in self.trials if trial.number in kept))

    def of(self, number: int | None) -> TrialRecord | None:
        """The trial with this number."""
        return next((trial for trial in self.trials if trial.number == number), None)

    def columns(self) -> list[str]:
        """The searched fields, then whatever else trials set, in the order of appearance."""
        others = (name for trial in self.trials for name in trial.params)
        return list(dict.fromkeys([*self.fields, *others]))

    def to_json(self) -> str:
        """The text of leaderboard.json, the best trial first; NaN and infinity become null, as JSON has neither."""
        content = {**asdict(self), "trials": [asdict(trial) for trial in self.ordered()]}
        return json.dumps(_finite(content), indent=1, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
