"""Further exports of a finished run: files that are made of its exported adapter or of its merged model.

An exporter is one object in a module of its own and one line in config/tables.py, or an entry point of an installed
package. `export.also: {NAME: OPTION}` asks for it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.peft_folder import replacing
from olora_ray.cluster.spec import TrainSpec
from olora_ray.common.errors import UserError
from olora_ray.config.schema import AnyConfig, Config
from olora_ray.config.section import Source
from olora_ray.config.tables import EXPORTERS
from olora_ray.data import reader, scan
from olora_ray.data.formats import columns_of, to_example
from olora_ray.data.formats.format import Chat, Rejected
from olora_ray.data.sources import list_files
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
class Trained:
    """Facts of the model, beside its weights, that an export may write."""

    name: str
    """Name of the run or of the registered model."""
    model: "PreTrainedModel"
    """The base model without weights."""
    config: AnyConfig
    eos: tuple[int, ...]
    """Ids of the tokens that end an answer."""
    system: str | None
    """The system message of all training rows, if they have the same."""


@dataclass(frozen=True)
class Exporter:
    """A further export: its check before step 0, and its files."""

    label: str
    """Its name in the report, such as `GGUF (llama.cpp)`."""
    needs: Literal["adapter", "merged"]
    """The export that it is made of."""
    options: tuple[str, ...]
    """Texts that `export.also` may have as its value."""
    problem: Callable[[BaseModel, "PreTrainedModel", AnyConfig, str], str | None]
    """(base model, model without weights, config, option) -> why it cannot be written and what to do, or None."""
    write: Callable[[Trained, Path, Path, str], None]
    """(model, folder of the export that it needs, empty folder to fill, option)."""


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
    config = work.spec.config
    system = system_message(config.data.train)
    trained = Trained(config.run.name, work.model, config, work.spec.eos, system)
    with replacing(out) as folder:
        exporter.write(trained, sources[exporter.needs], folder, config.export.also[name])


def system_message(sources: Sequence[Source]) -> str | None:
    """Return the system message of all rows at the beginning of the data; None if there is none or the data is gone."""
    found = set[str | None]()
    for source in sources:
        columns = columns_of(source.format, source.fields)
        with contextlib.suppress(UserError, OSError, IndexError):
            file = scan.head(list_files(source, "data.train", "")[0])
            assert file.file
            read = reader.read_unit(file.file, file.units[0], file.columns, columns)
            for _, row in itertools.islice(read, 100):
                with contextlib.suppress(Rejected):
                    example = to_example(source.format, row, source.fields, True, source)
                    content = None
                    if isinstance(example, Chat) and example.messages[0].get("role") == "system":
                        content = example.messages[0].get("content")
                    found.add(content)
    if len(found) != 1:
        return None
    return found.pop()
