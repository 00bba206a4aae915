"""Specification of a search: what all its trials have in common, and the config and folder of each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.config.load import at, override
from olora_ray.config.schema import Config, extended
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep.space import SAME_BASE, Space
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import Schedule

NUMBER = "number"
"""Key of a trial's number in its Tune config; the other keys are draws."""
ENDED = "ended"
"""Key of a result that is the last one because the training is over; Tune's own `done` is also set by schedulers."""


PROGRESS = "progress"
"""Key of a result: the percentage of the trial's own steps that is done."""
WHOLE = 100.0
"""The progress of a trial that has done all its steps."""


@dataclass(frozen=True)
class SweepSpec:
    """Travels to every trial."""

    name: str
    """Of the search."""
    folder: str
    """`<storage>/<name>`."""
    train_spec: TrainSpec
    """With the config as it is, but for what the space sets for all trials."""
    space: Space
    parent: str
    """Id of the search's MLflow run."""
    spared: float
    """Seconds of work that were done once for all trials."""
    shared_bases: tuple[Any, ...] = ()
    """Actors that train several adapters on one base; none if every trial has workers of its own."""
    tracking: str | None = None
    """The search's MLflow, as each process of a trial finds it; None: as the config says."""

    def values(self, number: int, draws: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted field -> value of a trial; nothing for the default."""
        return {} if number == 0 and self.space.has_default() else self.space.values(draws)

    def shown(self, number: int, draws: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted field -> value of everything that is searched, for people to read; of the default too."""
        return self.values(number, draws) or {field: at(self.train_spec.config, field) for field in self.space.search}

    def config(self, number: int, draws: Mapping[str, Any]) -> Config:
        """The config of a trial."""
        return override(self.train_spec.config, self.values(number, draws) | self._own(number))

    def spec_of(self, config: Config) -> TrainSpec:
        """The specification of a trial with this config, where all trials have the same base model and tokens."""
        return replace(self.train_spec, config=config)

    def tracked(self, spec: TrainSpec) -> TrainSpec:
        """The specification of a trial, which is tracked where the search is.

        Tune has each trial work in a folder of its own, where a relative path would lead elsewhere, and its process has
        the variables of its node. In the trial's own config, which it keeps, the setting stays as it was.
        """
        if self.tracking is None:
            return spec
        return replace(spec, config=override(spec.config, {"tracking.uri": self.tracking}))

    def trial_folder(self, number: int, config: Config) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(config, trial_place(self.folder, number))

    def shares_data(self) -> bool:
        """Whether all trials have the same base model and tokens."""
        return all(field.startswith(SAME_BASE) for field in self.space.search)

    def total(self) -> int:
        """Steps of a trial that does not vary them."""
        return self.steps(self.train_spec.config)

    def steps(self, config: Config, store: TokenStore | None = None) -> int:
        """Steps of a trial with this config on the tokens in `store`, by default those of the search."""
        total = Schedule(config.train, store or self.train_spec.train).total()
        assert total is not None, "a search starts with complete tokens"
        return total

    def _own(self, number: int) -> dict[str, Any]:
        changes: dict[str, Any] = {"run.name": extended(self.name, trial_name(number)), "registry.model": None}
        if self.space.scheduler.kind == "population":
            train = self.train_spec.config.train
            every = self.space.scheduler.interval or train.eval_every
            # A member that is taken over may be many checkpoints ahead of the one that is wanted.
            changes |= {
                "train.eval_every": every,
                "train.checkpoint_every": every,
                "train.keep": self.total() // every + 2,
            }
        return changes


def trial_name(number: int) -> str:
    """A trial's name in Tune, and that of its folder."""
    return f"trial-{number:03d}"


def number_of(name: str | None) -> int:
    """The number in a `trial_name`."""
    assert name
    return int(name.rpartition("-")[2])


def trial_place(folder: str, number: int) -> str:
    """The folder of a trial of the search in `folder`."""
    return storage.join(folder, "trials", trial_name(number))
