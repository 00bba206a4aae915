"""Input and result of a training worker."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from olora_ray.adapter.methods import FROM_WEIGHTS, METHODS
from olora_ray.common import storage
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.tokens.store import TokenStore
from olora_ray.train.checkpoint import TrainState

LEFT = "left"
"""`TrainResult.interrupted` of a worker that has left a training which goes on without it, or came when it was over."""


@dataclass(frozen=True)
class TrainSpec:
    """All that a worker needs; whatever is large lies under the storage path."""

    config: Config
    base: BaseModel
    tokenizer: str
    """Digest of the tokenizer and its chat template."""
    eos: tuple[int, ...]
    """Token ids that end an answer."""
    train: TokenStore
    """May still be growing."""
    eval: TokenStore | None
    start: str | None = None
    """Digest of the checkpoint at train.start, if there is one."""
    shared: str | None = None
    """Folder of what the trials of a search share: the factors, and what the base model does on the held-out rows."""
    template: str | None = None
    """The chat template that data.chat_template names; what is exported gets it."""
    recompute: bool = False
    """Whether blocks are run again in the backward pass: train.activation_checkpointing, on this cluster. No part of
    the identity: it changes no number."""

    def identity(self) -> dict[str, str]:
        """What decides the numbers of a run: digests of contents, wherever they lie, and the adapter's settings."""
        return (
            {
                "base model": self.base.digest,
                "tokenizer": self.tokenizer,
                "training data": self.train.digest,
                "held-out data": self.eval.digest if self.eval else "",
                "adapter": self.config.adapter.identity(),
            }
            | self._packed()
            | ({"start": self.start} if self.start else {})
            | ({"order": "windows"} if self.train.windowed else {})
        )

    def _packed(self) -> dict[str, str]:
        """How the base's weights are packed, and in which precision unpacked; empty if they are not."""
        model = self.config.model
        packed = {"quantization": model.quantization, "dtype": model.dtype}
        return {"quantised base": json.dumps(packed)} if model.quantization != "none" else {}

    def base_identity(self) -> dict[str, str]:
        """What decides the numbers before the first step: the base model's, or those of the adapter to start from."""
        return {what: digest for what, digest in self.identity().items() if what != "adapter"}

    def baseline_identity(self) -> dict[str, str]:
        """What decides the loss and the answers before the first step (train/scoring.py)."""
        settings = {"dtype": self.config.model.dtype, "max_new_tokens": self.config.evaluation.max_new_tokens}
        return self.base_identity() | {"settings": json.dumps(settings)}

    def factor_origin(self) -> dict[str, str]:
        """What decides A~ and B~, but for their rank."""
        adapter = self.config.adapter
        origin = {
            "base model": self.base.digest,
            "method": adapter.method,
            "targets": json.dumps(adapter.targets),
            "seed": str(self.config.run.seed),
        } | {name: str(value) for name, value in adapter.options().items()}
        origin |= self._packed()
        if adapter.method not in FROM_WEIGHTS:  # what the base computes of the data, in its precision
            origin |= {"training data": self.train.digest, "dtype": self.config.model.dtype}
        return origin

    def factor_place(self) -> str:
        """Folder of the factors that a search shares, for this method and, if others do not follow from it, rank."""
        assert self.shared is not None
        adapter = self.config.adapter
        prefix = METHODS[adapter.method].prefix
        return storage.join(self.shared, adapter.method if prefix else f"{adapter.method}-{adapter.rank}")


@dataclass(frozen=True)
class AnswerPair:
    """One held-out prompt with its answers, as token ids."""

    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class TrainResult:
    """Result of a training, as the driver gets it."""

    problem: str | None = None
    """Why training stopped, if the user has to act."""
    passes: bool = False
    """Whether the problem passes by itself: a store did not answer a worker."""
    interrupted: str | None = None
    """Why training stopped between two steps, with a checkpoint, if it was asked to."""
    preempted: bool = False
    """Whether that was because a node is preempted."""
    state: TrainState | None = None
    stopped_early: bool = False
    answers: tuple[AnswerPair, ...] = ()
    self_test: dict[str, Any] | None = None
    """What the self-test of the model has found (train/self_test.py)."""

    def to_json(self) -> str:
        """The text of training.json."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrainResult":
        """Read `to_json` back; raises ValueError of one line for anything else."""
        tree = json.loads(text)
        names, inner = ({field.name for field in fields(kind)} for kind in (cls, TrainState))
        if not isinstance(tree, dict) or not {"answers", "state"} <= tree.keys() <= names:
            raise ValueError("not what a training gave")
        if isinstance(tree["state"], dict) and (unknown := tree["state"].keys() - inner):
            raise ValueError(f"state: unknown field {min(unknown)}")
        try:
            return _RESULT.validate_python(tree)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}".removeprefix(": ")) from None


_RESULT = TypeAdapter(TrainResult)
