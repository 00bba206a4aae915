"""Specification of a search: what all trials have in common, and the config and folder of each trial."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from olora_ray.cluster.decide import PACKING
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import storage
from olora_ray.config.decided import DecidedConfig, Decisions, with_values
from olora_ray.config.load import at, override
from olora_ray.config.schema import Config
from olora_ray.config.section import extended
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep.space import SAME_BASE, Draws, Space, Values
from olora_ray.tokens.store import TokenStore
from olora_ray.train.loader import known_steps

# Key of a trial's number in its Tune config. The other keys are draws.
NUMBER = "number"
# Key of a result that is the last because the training is over. Tune's own `done` does not say so: schedulers set it,
# too.
ENDED = "ended"


# Key of a result: the percentage of the trial's own steps that are done.
PROGRESS = "progress"
# Key of a result: True if the metric was measured at its step.
EVALUATED = "evaluated"
# Key of a result: the mean training loss of the second half of the steps so far, if trials are compared by it.
PAIRED = "paired"
# The progress of a trial that has done all its steps.
WHOLE = 100.0


@dataclass(frozen=True)
class SweepSpec:
    """The specification of a search that every trial gets, pickled."""

    name: str
    folder: str
    """`<storage>/<name>`."""
    train_spec: TrainSpec
    """Its config is the user's, with what the space sets for all trials."""
    space: Space
    parent: str
    """Id of the search's MLflow run."""
    spared: float
    """Seconds of work that were done once for all trials."""
    shared_bases: tuple[Any, ...] = ()
    """Actors that train several adapters on one base model; empty if every trial has its own workers."""
    tracking: str | None = None
    """The search's MLflow address, valid in every process of a trial; None: the config's."""
    decisions: Decisions = field(default_factory=dict)
    """The decisions of the search, which hold for all trials."""

    def shown(self, number: int, draws: Draws) -> Values:
        """Return dotted field -> value of everything that is searched, for people; for the default trial too."""
        values = self.space.trial_values(number, draws)
        return values or {field: at(self.train_spec.config, field) for field in self.space.search}

    def config(self, number: int, draws: Draws) -> DecidedConfig:
        name = self.space.own_name(number) or trial_name(number)
        own = {"run.name": extended(self.name, name), "registry.model": None}
        return override(self.train_spec.config, self.space.trial_values(number, draws) | own)

    def spec_of(self, config: DecidedConfig) -> TrainSpec:
        """Return the specification of a trial, if all trials have the same base model and tokens."""
        return replace(self.train_spec, config=config)

    def asked(self, config: DecidedConfig) -> Config:
        """Return the config of a trial with sources or a model of its own, with auto where the search has decided."""
        drawn = {*self.space.search, *self.space.set}
        known = {}
        for name, decision in self.decisions.items():
            once = name == PACKING or name.endswith(".chat")
            if once and name not in drawn and at(config, name) is not None:
                known[name] = decision.asked
        return with_values(config, Config, known)

    def decided(self, config: DecidedConfig) -> Decisions:
        """Return the decisions that hold in a trial."""
        return {
            name: decision
            for name, decision in self.decisions.items()
            if at(config, name) == decision.value
        }

    def tracked(self, spec: TrainSpec) -> TrainSpec:
        # Tune runs each trial in its own folder, where a relative path would lead elsewhere, and its process has the
        # environment variables of its node. The config in the trial's folder keeps the user's setting.
        if self.tracking is None:
            return spec
        return replace(spec, config=override(spec.config, {"tracking.uri": self.tracking}))

    def trial_folder(self, number: int) -> RunFolder:
        return RunFolder(trial_path(self.folder, number, self.space))

    def shares_data(self) -> bool:
        return all(field.startswith(SAME_BASE) for field in self.space.search)

    def total(self) -> int:
        return self.steps(self.train_spec.config)

    def steps(self, config: DecidedConfig, store: TokenStore | None = None) -> int:
        total = known_steps(config.train, store or self.train_spec.train)
        assert total is not None, "a search starts with complete tokens"
        return total

    def grace(self) -> int:
        """Return the steps of the unchanged config before a trial may be stopped."""
        if self.space.scheduler.grace:
            return self.space.scheduler.grace
        if self.space.paired():
            return max(3, math.ceil(self.total() / 16))  # the first loss is the same for all trials
        return self.train_spec.config.train.eval_every

    def rungs(self) -> list[int]:
        """Return the steps after which a trial's training losses are compared; empty if they are not."""
        settings = self.space.scheduler
        # In the second half a stop saves little, and leaves a trial without a value. A grace that is set may be there.
        last = self.total() - 1 if settings.grace else self.total() // 2
        steps: list[int] = []
        step = float(self.grace())
        while self.space.paired() and math.ceil(step) <= last:
            steps.append(math.ceil(step))
            step *= settings.reduction
        return steps


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def number_of(trial: Any) -> int:
    """Return the number of Tune's trial."""
    return int(str(trial).rpartition("-")[2])


def trial_path(folder: str, number: int, space: Space | None = None) -> str:
    return storage.join(folder, "trials", (space and space.own_name(number)) or trial_name(number))
