"""Contents of the version that a run registers: its merged model, or its adapter with the base by reference."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import copies
from olora_ray.common.errors import UserError
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.answers import Scores
from olora_ray.pipeline.description import describe
from olora_ray.pipeline.input_example import request
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tracking import registered
from olora_ray.tracking.contents import BaseOfAdapter, Contents
from olora_ray.tracking.mlmodel import has_chat_template


@contextmanager
def of_run(spec: TrainSpec, folder: RunFolder, result: TrainResult, scores: Scores) -> Iterator[Contents]:
    """What a finished run registers, as files on this machine for the block."""
    config = spec.config
    with copies.fetched(folder.merged if config.export.merged else folder.adapter) as place:
        base = None if config.export.merged else _reference(spec, place)
        yield Contents(
            place,
            base,
            answers_as=config.registry.model or config.run.name,
            description=describe(spec, result, scores, base),
            example=_example(spec, place, result),
        )


def _example(spec: TrainSpec, place: Path, result: TrainResult) -> dict[str, Any] | None:
    """The input example; a tokenizer that does not load here is no reason not to register."""
    with suppress(UserError):
        return request(spec, place, result.answers[0].prompt) if result.answers else None
    return None


def _reference(spec: TrainSpec, adapter: Path) -> BaseOfAdapter:
    """The base of a run, as an adapter-only version keeps it."""
    base, revision = spec.base, spec.config.model.revision
    commit = _commit(base)
    # MLflow takes the tokenizer from where it takes the base. The hub's does not do if a chat template was added.
    on_hub = commit is not None and has_chat_template(adapter) == has_chat_template(Path(base.folder))
    name = registered.pinned(base.name, spec.config)
    return BaseOfAdapter(name, base.digest, base.folder, commit or revision, on_hub)


def _commit(base: BaseModel) -> str | None:
    """The commit of a model that lies as the hub's client has downloaded it: models--ORG--NAME/snapshots/COMMIT."""
    place = Path(base.folder)
    from_hub = place.parts[-3:-1] == (f"models--{base.name.replace('/', '--')}", "snapshots")
    return place.name if from_hub else None
