"""A space whose trials are a list: each has values that belong together, as a method and its own learning rate."""

from collections.abc import Mapping, Sequence
from typing import Any

from olora_ray.config.schema import Config
from olora_ray.sweep.domain import Chooser, Domain
from olora_ray.sweep.space import Draws, Scheduler, Space

PLACE = "place"
"""The only draw: the place in the list."""


class Listed(Space):
    """A search without a choice: every trial of a list once, each to its end."""

    of_trials: tuple[dict[str, Any], ...]
    """Dotted field -> value of each trial."""

    @classmethod
    def of(cls, trials: Sequence[Mapping[str, Any]]) -> "Listed":
        """The space of these trials, which all name the same fields."""
        values = {field: list(dict.fromkeys(trial[field] for trial in trials)) for field in trials[0]}
        return cls(
            search={field: Domain(choice=tuple(found)) for field, found in values.items()},
            set={},
            searcher="grid",
            scheduler=Scheduler(kind="none"),
            include_default=False,
            of_trials=tuple(dict(trial) for trial in trials),
        )

    def count(self) -> int:
        """Number of trials."""
        return len(self.of_trials)

    def cells(self) -> int:
        """The same: what is crossed is not the values of the fields."""
        return len(self.of_trials)

    def drawn(self, number: int) -> dict[str, Any]:
        """The place of a trial."""
        return {PLACE: number}

    def draw(self, chooser: Chooser) -> dict[str, Any]:
        """Nothing is drawn."""
        raise NotImplementedError("the trials are listed")

    def draw_names(self) -> list[str]:
        """The key of the draws."""
        return [PLACE]

    def values(self, draws: Draws) -> dict[str, Any]:
        """Field -> value at a place."""
        return dict(self.of_trials[draws[PLACE]]) if PLACE in draws else {}

    def as_draws(self, config: Config) -> None:
        """Whether one of them is the config as it is makes no difference here."""
