"""Further exports of a finished run: files that are made of its exported adapter or of its merged model.

An exporter is one object in a module of its own and one line in config/tables.py, or an entry point of an installed
package. `export.also: {NAME: OPTION}` asks for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.peft_folder import replacing
from olora_ray.cluster.spec import TrainSpec
from olora_ray.config.schema import Config
from olora_ray.config.tables import EXPORTERS
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
    base = on_this_node(spec.base, spec.config)
    read = checkpoints.read(checkpoint)
    model = skeleton(base, spec.config.model)
    adapter = read.best_adapter()
    adapted = []
    if spec.config.export.merged:
        adapted = groups(Path(base.folder), model, adapter)
    return Work(spec, base, model, adapter, read.state, adapted)


@dataclass(frozen=True)
class Exporter:
    """A further export: its check before step 0, and its files."""

    label: str
    """Its name in the report, such as `GGUF (llama.cpp)`."""
    needs: Literal["adapter", "merged"]
    """The export that it is made of."""
    options: tuple[str, ...]
    """Texts that `export.also` may have as its value."""
    problem: Callable[[BaseModel, "PreTrainedModel", Config, str], str | None]
    """(base model, model without weights, config, option) -> why it cannot be written and what to do, or None."""
    write: Callable[[Work, Path, Path, str], None]
    """(work, folder of the export that it needs, empty folder to fill, option)."""


@cache
def exporter_named(name: str) -> Exporter:
    return EXPORTERS.load(name, Exporter)


def problems(base: BaseModel, model: "PreTrainedModel", config: Config) -> Iterator[str]:
    """Yield one line per further export that cannot be written, with its field and what to do."""
    for name, option in config.export.also.items():
        exporter = exporter_named(name)
        field = f"export.also.{name}"
        if option not in exporter.options:
            yield f"{field}: {option!r} is none of {', '.join(exporter.options)}"
        elif exporter.needs == "merged" and not config.export.merged:
            yield f"{field}: it is made of the merged model; set export.merged: true, or delete this line"
        else:
            why = exporter.problem(base, model, config, option)
            if why:
                yield f"{field}: {why}"


def write(work: Work, name: str, sources: Mapping[str, Path], out: Path) -> None:
    """Write one further export into the folder `out`; `sources` has the folders adapter and merged."""
    exporter = exporter_named(name)
    with replacing(out) as folder:
        exporter.write(work, sources[exporter.needs], folder, work.spec.config.export.also[name])
