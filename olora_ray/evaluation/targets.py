"""Resolves the MODEL argument of evaluate.py to base model, adapter and config.

a base model         hub id, folder, package://PACKAGE/FILE
a registered model   models:/NAME@ALIAS or models:/NAME/VERSION: merged, or an adapter on its base
a run's folder       runs/NAME: its merged export, else its exported adapter, else its best checkpoint
a checkpoint         runs/NAME/checkpoints/step-0000100: the adapter of that step
an adapter           a folder with adapter_config.json, such as runs/NAME/export/adapter
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.peft_folder import CONFIG as ADAPTER_CONFIG
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.config import command_line
from olora_ray.config.load import build, load, override, parse_yaml, validated
from olora_ray.config.schema import NO_GATE, AnyConfig, Config, EvaluationConfig
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import find_model, parts
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tracking import models
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

Kind = Literal["run", "checkpoint", "adapter", "model"]
SETTINGS = "config.yaml"


@dataclass(frozen=True)
class Target:
    """One model to evaluate."""

    name: str
    """As it was asked for."""
    base: BaseModel
    adapter: str | None
    """A plain-LoRA folder for the base."""
    config: AnyConfig
    """The settings of the evaluation, with the base as their model."""


def settings(names: Sequence[str], file: str | None, changes: Mapping[str, Any]) -> AnyConfig:
    """The settings of an evaluation: of the file, else of the first run that the models come from, else defaults.

    Raises UserError for a config that cannot be.
    """
    for name in names:
        _refuse_nowhere(name)
    found = _settings(names, file, changes)
    if (kind := found.model.quantization) != "none":
        logger.info(f"model.quantization: models are measured on their weights as they are stored, not as {kind}")
        return override(found, {"model.quantization": "none"})
    return found


def _settings(names: Sequence[str], file: str | None, changes: Mapping[str, Any]) -> AnyConfig:
    if file is not None:
        return command_line.resolved(load(file, {**NO_GATE, **changes}), Path.cwd())
    if run := next(filter(None, map(run_of, names)), None):
        own = _read(storage.join(run, SETTINGS))
        place, _, name = run.rpartition("/")
        if name == own.run.name and run != own.folder():  # its storage was moved
            own = override(own, {"run.storage": place})
        return override(own, {**NO_GATE, **changes})
    defaults = validated(EvaluationConfig, {"model": {"name": names[0]}}, "config")
    return command_line.resolved(override(defaults, changes), Path.cwd())


def _refuse_nowhere(name: str) -> None:
    """Raise UserError for a path to nothing; one with a single slash is a hub id, unless its first part is a folder."""
    place = _absolute(name)
    if not place or storage.is_uri(place) or storage.exists(place):
        return
    parent = Path(place).parent
    is_path = name.startswith(("/", ".", "~")) or name.strip("/").count("/") != 1
    if is_path or parent.is_dir():
        beside = sorted(each.name for each in parent.iterdir()) if "/" in name and parent.is_dir() else []
        there = ", ".join(beside[:8])
        hint = f"; {parent} has {there}" if there else ""
        raise UserError(f"{name}: no such file or folder{hint}")


def run_of(name: str) -> str | None:
    """The folder of the run that a run, checkpoint or export belongs to; None if it belongs to none.

    Raises UserError for an address that cannot be looked at.
    """
    place = _absolute(name)
    if not place or not _readable(name, place):
        return None
    for folder in (place, place.rsplit("/", 2)[0]):
        if _exists(folder, SETTINGS) and (_exists(folder, "checkpoints") or _exists(folder, "export")):
            return folder
    return None


def resolve(name: str, shared: AnyConfig) -> Target:
    """Find the model; whatever has to be downloaded, converted or exported for it is made here.

    `shared` are the settings of the evaluation, whose model is replaced. Raises UserError for a name that
    leads nowhere, or an adapter of another base model.
    """
    match kind_of(name):
        case "run":
            return _of_run(name, shared)
        case "checkpoint":
            found = checkpoints.read(_absolute(name))
            own = _read(storage.join(_absolute(name), SETTINGS))
            return _of_checkpoint(name, found, found.adapter, own, shared)
        case "adapter":
            return _of_adapter(name, shared)
        case "model":
            config = _with_model(shared, name)
            version = models.of_config(config)
            if version is not None and version.base is not None:
                measured, base, adapter = parts(version, version.base, config)
                return Target(name, base, adapter, measured)
            return Target(name, find_model(config, version), None, config)


def kind_of(name: str) -> Kind:
    """The kind of model that a name means, by the files that lie there."""
    place = _absolute(name)
    if not place or not _readable(name, place):
        return "model"
    if _exists(place, checkpoint.MANIFEST) and _exists(place, checkpoint.ADAPTER):
        return "checkpoint"
    if _exists(place, ADAPTER_CONFIG):
        return "adapter"
    return "run" if _exists(place, SETTINGS) and not _exists(place, "config.json") else "model"


def _of_run(name: str, shared: AnyConfig) -> Target:
    root = _absolute(name)
    storage_path, _, run = root.rpartition("/")  # it may have been moved
    own = override(_read(storage.join(root, SETTINGS)), {"run.storage": storage_path, "run.name": run})
    folder = RunFolder(own)
    newest = checkpoints.latest_good(folder.checkpoints)
    done = folder.finished()
    if done or (newest and folder.exported(newest[1].state.step)):
        if not (own.export.merged and _exists(folder.merged, "config.json")):
            known = newest[1].identity.get("base model") if newest else ((done or {}).get("base") or {}).get("digest")
            base, config = _base_of(name, known, own, shared)
            return Target(name, base, folder.adapter, config)
        config = _with_model(shared, folder.merged)
        return Target(name, find_model(config), None, config)
    if newest is None:
        raise UserError(f"{name}: this run has neither exports nor a complete checkpoint yet")
    logger.info(f"{name}: not exported yet: its best adapter up to step {newest[1].state.step} is evaluated")
    return _of_checkpoint(name, newest[1], newest[1].best_adapter(), own, shared)


def _base_of(name: str, known: str | None, own: Config, shared: AnyConfig) -> tuple[BaseModel, AnyConfig]:
    """The base of a run, and the settings with it; raises UserError unless it has the digest `known` still."""
    config = _with_model(shared, own.model.name, own.model.revision)
    base = find_model(config)
    if known != base.digest:
        raise UserError(f"{name}: was trained on another base model than {own.model.name} is now; set model.revision")
    return base, config


def _of_checkpoint(
    name: str, found: Checkpoint, adapter: Mapping[str, AdapterWeights], own: Config, shared: AnyConfig
) -> Target:
    base, config = _base_of(name, found.identity.get("base model"), own, shared)
    text = json.dumps([name, found.state.step, found.identity, own.adapter.identity()])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    place = storage.join(config.run.storage, "adapters", f"{Path(name).name}-{found.state.step}-{key}")
    with node_cache.local_folder(place) as folder:
        write_adapter(adapter, own.adapter, base.folder, folder, skeleton(base, config.model))
    return Target(name, base, place, config)


def _of_adapter(name: str, shared: AnyConfig) -> Target:
    place = _absolute(name)
    run = run_of(name)
    if run is not None:
        own = _read(storage.join(run, SETTINGS)).model
        base_name, revision = own.name, own.revision
    else:
        try:
            fields = json.loads(storage.read_text(storage.join(place, ADAPTER_CONFIG)))
            base_name, revision = str(fields["base_model_name_or_path"]), fields.get("revision")
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{place}/{ADAPTER_CONFIG}: does not name its base_model_name_or_path") from None
    config = _with_model(shared, base_name, revision)
    return Target(name, find_model(config), place, config)


def _read(place: str) -> Config:
    return build(parse_yaml(storage.read_text(place), place), place)


def _with_model(shared: AnyConfig, name: str, revision: str | None = None) -> AnyConfig:
    known = revision or (shared.model.revision if shared.model.name == name else None)
    found = override(shared, {"model.name": name, "model.revision": known})
    return command_line.resolved(found, Path.cwd())


def _absolute(name: str) -> str:
    """The place a name means if it is a path or URI; '' for other names."""
    if name.startswith(("models:/", "package://", "hf://")):
        return ""
    return command_line.left(name, Path.cwd()).rstrip("/")


def _readable(name: str, place: str) -> bool:
    """Whether something is there; raises UserError if the storage does not say."""
    if storage.is_uri(place) and ".." in place.partition("?")[0].split("/"):
        raise UserError(f"{name}: a URI cannot go up with '..'; write the address without it")
    with as_user_error(f"{name}: cannot be looked at", OSError, ValueError):
        return storage.exists(place)


def _exists(folder: str, name: str) -> bool:
    return storage.exists(storage.join(folder, name))
