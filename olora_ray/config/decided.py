"""A config in which everything is decided that the driver decides, with the reasons.

`Config` is what the user asked for: it names the run, and the run folder keeps it as config.yaml. `DecidedConfig` is
what the run does: no field of its own types is `auto`. `cluster/decide.py` makes it once, and the run folder keeps its
decisions as decided.json. `DataConfig` lies between the two: with it, rows become tokens before a cluster is known.

Only workers can measure `model.dtype`, `model.attention` and `train.lr`. These stay as they were asked for, the plan
assumes what `Expected` says, and the checkpoint's state holds what was measured.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from olora_ray.config.load import (
    ADDED,
    FREE_TO_CHANGE,
    RETIRED,
    changed,
    flatten,
    override,
    validated,
)
from olora_ray.config.schema import (
    Cluster,
    Config,
    Data,
    EvaluationConfig,
    EvaluationData,
    Train,
)
from olora_ray.config.section import PositiveInt, is_auto

# The types.


class DecidedData(Data):
    """The sources of the rows, and how rows become sequences, without `auto`."""

    max_length: PositiveInt
    packing: bool


class DataConfig(Config):
    """A config whose rows can become tokens."""

    data: DecidedData


Recompute = Literal["swiglu"] | bool
"""Activations that the backward pass makes again: of all blocks (true), or two of each MLP."""


class DecidedTrain(Train):
    """The training without `auto`, except for the learning rate."""

    micro_batch: PositiveInt
    activation_checkpointing: Recompute

    def micro_batches(self) -> int:
        return -(-self.global_batch // self.micro_batch)


class DecidedCluster(Cluster):
    """The workers without `auto`."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt]
    gpus_per_worker: float

    @property
    def fewest(self) -> int:
        if isinstance(self.workers, int):
            return self.workers
        return self.workers[0]

    @property
    def most(self) -> int:
        if isinstance(self.workers, int):
            return self.workers
        return self.workers[1]

    @property
    def is_elastic(self) -> bool:
        return self.fewest < self.most


class DecidedConfig(DataConfig):
    """The configuration of a run as it trains."""

    train: DecidedTrain
    cluster: DecidedCluster

    def accumulation(self, workers: int | None = None) -> int:
        """Return the largest number of micro-batches of one worker in a step; `workers` defaults to the maximum."""
        return -(-self.train.micro_batches() // (workers or self.cluster.most))

    def with_step(self, micro_batch: int, recompute: Recompute) -> Self:
        """Return the config with another micro-batch and recomputation."""
        values = {"train.micro_batch": micro_batch, "train.activation_checkpointing": recompute}
        return override(self, values)


class DecidedEvaluationData(EvaluationData):
    """The held-out rows of an evaluation without `auto`."""

    max_length: PositiveInt
    packing: bool


class DecidedEvaluation(EvaluationConfig):
    """The configuration of an evaluation as it measures."""

    data: DecidedEvaluationData
    train: DecidedTrain
    cluster: DecidedCluster


AnyData = DataConfig | DecidedEvaluation
"""A config whose rows can become tokens."""
AnyDecided = DecidedConfig | DecidedEvaluation
"""A config with which workers can compute."""


# The decisions.


@dataclass(frozen=True)
class Decision:
    """An entry of decided.json."""

    value: Any
    why: str
    asked: Any = "auto"


Decisions = Mapping[str, Decision]
"""Dotted field that was asked as auto -> its decision."""


BEGUN = "kept: the run began with it"
KEPT = re.compile(
    r"data\.(train|eval)\.\d+\.(format|chat)|data\.max_length|data\.packing"
    r"|train\.(micro_batch|objective)"
)
"""Fields whose decisions a resumed run keeps, because the bytes of its result depend on them."""


@dataclass(frozen=True)
class Kept:
    """The decisions that the earlier attempts of a run leave to the next one."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted field -> plain value, of config.yaml with the values of decided.json. Empty without an earlier attempt.

    A run folder of an older version has no decided.json. Its config.yaml has the numbers.
    """
    decisions: Decisions = field(default_factory=dict)
    dtype: str | None = None
    """The precision in which the run started."""

    def decision(self, name: str) -> Decision | None:
        """Return the decision of a field that is asked as auto again; None if the field must be decided now."""
        if name in self.decisions:
            return self.decisions[name]
        value = self.settings.get(name, "auto")
        if is_auto(value):
            return None
        return Decision(value, BEGUN)

    def fields(self, setting: str, asked: dict[str, str]) -> Decision:
        """Return the decision of the fields of a source whose format is kept."""
        prefix = f"{setting}.fields."
        value = {
            name.removeprefix(prefix): column
            for name, column in self.settings.items()
            if name.startswith(prefix)
        }
        return self.decisions.get(f"{setting}.fields") or Decision(value, BEGUN, asked)

    def filled(self, config: Config) -> Config:
        """Return the config with the kept values instead of auto, to compare it with that of the earlier attempts."""
        values = {}
        for name, asked in flatten(config).items():
            decision = self.decision(name)
            if not is_auto(asked) or decision is None or not KEPT.fullmatch(name):
                continue
            values[name] = decision.value
            if name.endswith(".format"):
                setting = name.removesuffix(".format")
                values[f"{setting}.fields"] = self.fields(setting, {}).value
        return override(config, values)


NOTHING = Kept()


SOURCE = re.compile(r"data\.(train|eval)\.\d+\.")


def lasting_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed, in the form that all releases give them.

    Removed fields count with their defaults, and fields of ADDED do not count at theirs.
    """
    removed = {name: default for name, (default, _) in RETIRED.items()}
    return {
        name: value
        for name, value in (removed | settings).items()
        if not name.startswith(FREE_TO_CHANGE)
        and value not in ADDED.get(SOURCE.sub("data.*.", name), ())
    }


Made = TypeVar("Made", bound=Config | EvaluationConfig)


def values_of(decisions: Decisions) -> dict[str, Any]:
    return {name: decision.value for name, decision in decisions.items()}


def with_values(
    config: Config | EvaluationConfig, made: type[Made], values: Mapping[str, Any]
) -> Made:
    """Return a config of another type with these values; it must then be without `auto`."""
    tree = changed(config.model_dump(mode="json"), values)
    return validated(made, tree, "config")


@dataclass(frozen=True)
class Expected:
    """The values that the plan assumes for fields that only workers can measure."""

    gpu: bool
    """True if the model is on a GPU."""
    dtype: str
    """Precision of the base: float32 or bfloat16."""
    attention: str
    """Attention kernel; auto: the fastest that is installed here."""
    card: str = ""
    """Name of the workers' GPUs by their driver; empty if it is not known, or if they differ."""
