"""The opened base model and adapter of an export."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_ray.adapter.layer import AdapterWeights
from olora_ray.cluster.spec import TrainSpec
from olora_ray.model.load import load_tokenizer, skeleton
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.model.stored import Group, groups
from olora_ray.train import checkpoints
from olora_ray.train.checkpoint import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Work:
    """The opened base model and adapter on this node."""

    spec: TrainSpec
    base: BaseModel
    model: "PreTrainedModel"
    """The base model without weights."""
    adapter: dict[str, AdapterWeights]
    state: TrainState
    groups: list[Group]
    """The adapted weights of the whole model."""

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base, self.spec.config.model)


def prepare(spec: TrainSpec, checkpoint: str) -> Work:
    """Open base model and adapter; raise UserError if export.merged is set and a weight cannot be merged."""
    base, read = on_this_node(spec.base, spec.config), checkpoints.read(checkpoint)
    model, adapter = skeleton(base, spec.config.model), read.best_adapter()
    adapted = groups(Path(base.folder), model, adapter) if spec.config.export.merged else []
    return Work(spec, base, model, adapter, read.state, adapted)
