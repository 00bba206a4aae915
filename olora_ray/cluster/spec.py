"""Input and result of a training worker."""

import json
from dataclasses import dataclass
from typing import Any

from olora_ray.adapter.factor_cache import StoredFactors
from olora_ray.adapter.methods import method_named
from olora_ray.common import storage
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.tables import METHODS, OPTIMIZERS
from olora_ray.model.source import BaseModel
from olora_ray.tokens.store import TokenStore
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.objectives.objective import objective_of

IN_WINDOWS = 512
"""Shards above which earlier versions drew a pass in windows. The identity of such a store names its order, so that no
run resumes in another one."""


GUARD = "eval/guard/loss"
"""Metric: the loss on texts of no task, which rises if the model forgets."""


@dataclass(frozen=True)
class TrainSpec:
    """The input of a worker. It refers to large data by digests and by paths in the storage."""

    config: DecidedConfig
    base: BaseModel
    tokenizer: str
    """Digest of the tokenizer and its chat template."""
    eos: tuple[int, ...]
    """Token ids that end an answer."""
    train: TokenStore
    """An `Arrival` in a first run, which trains while it is being written."""
    eval: TokenStore | None
    start: str | None = None
    """Digest of the checkpoint at train.start, if it is set."""
    shared: str | None = None
    """Folder that the trials of a search share, for factors and for the base model's loss and answers."""
    template: str | None = None
    """The chat template that data.chat_template names. Exports contain it."""
    each_example: bool = False
    """True if evaluations keep the loss of each held-out example."""
    auto: tuple[str, ...] = ()
    """Fields that were asked for as auto and are decided in `config`."""
    planned: int = 0
    """Bytes that the plan expects on the device of the model."""
    step_seconds: float = 0.0
    """Seconds of a step by the plan; 0 without one."""
    guard: TokenStore | None = None
    """The texts of GUARD."""
    eval_sources: tuple[str, ...] = ()
    """Name of the source of each file of the held-out rows; () if they are of one source."""

    def identity(self) -> dict[str, str]:
        """Return what decides the numbers of a run: digests of contents, whatever their path, and adapter settings."""
        identity = {
            "base model": self.base.digest,
            "tokenizer": self.tokenizer,
            "training data": self.train.digest,
            "held-out data": self.eval.digest if self.eval else "",
            "adapter": self.config.adapter.identity(),
        }
        identity |= self._packed()
        identity |= objective_of(self.config.train).identity()
        identity["optimizer"] = OPTIMIZERS.identity(self.config.train.optimizer)
        if self.start:
            identity["start"] = self.start
        if self.train.shard_count > IN_WINDOWS:
            identity["order"] = "one draw"
        return identity

    def _packed(self) -> dict[str, str]:
        model = self.config.model
        if model.quantization == "none":
            return {}
        packed = {"quantization": model.quantization, "dtype": model.dtype}
        return {"quantised base": json.dumps(packed)}

    def base_identity(self) -> dict[str, str]:
        """Return what decides the numbers before the first step: the identity without the adapter's settings."""
        identity = self.identity()
        del identity["adapter"], identity["optimizer"]
        return identity

    def baseline_identity(self) -> dict[str, str]:
        """Return what decides the loss and the answers before the first step (train/scoring.py)."""
        settings = {
            "dtype": self.config.model.dtype,
            "max_new_tokens": self.config.evaluation.max_new_tokens,
        }
        return self.base_identity() | {"settings": json.dumps(settings)}

    def reference_origin(self) -> dict[str, str]:
        """Return what decides the losses before the first step, beside the tokens and what computes them."""
        return {"base model": self.base.digest, "start": self.start or "", **self._packed()}

    def factor_origin(self) -> dict[str, str]:
        """Return what decides the factors A0 and B0, except their rank."""
        adapter = self.config.adapter
        origin = {
            "base model": self.base.digest,
            "method": adapter.method,
            "targets": json.dumps(adapter.targets),
            "seed": str(self.config.run.seed),
        }
        origin |= {name: str(value) for name, value in adapter.options().items()}
        plugin = METHODS.plugin(adapter.method)
        if plugin:
            origin["plug-in"] = plugin.identity()
        origin |= self._packed()
        # Other methods derive the factors from what the base computes from the data, in its precision.
        if method_named(adapter.method).needs != "weight":
            origin |= {"training data": self.train.digest, "dtype": self.config.model.dtype}
        return origin

    def stored_factors(self) -> StoredFactors:
        """Return the factors in the folder that the trials of a search share."""
        # With some methods the factors of a lower rank are a prefix of a higher rank's factors: all ranks share them.
        assert self.shared is not None
        adapter = self.config.adapter
        name = adapter.method
        if not method_named(name).prefix:
            name += f"-{adapter.rank}"
        return StoredFactors(storage.join(self.shared, name), self.factor_origin(), adapter.rank)


@dataclass(frozen=True)
class AnswerPair:
    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class TrainResult:
    problem: str | None = None
    """Why training stopped, if the user must act."""
    passes: bool = False
    """True if the problem passes by itself: a store did not answer a worker."""
    interrupted: str | None = None
    """Why training stopped on request, with a checkpoint."""
    state: TrainState | None = None
    stopped_early: bool = False
    trainable: int | None = None
    """Number of trained parameters."""
    answers: tuple[AnswerPair, ...] = ()
    self_test: dict[str, Any] | None = None
    """Result of the model's self-test (train/self_test.py)."""
