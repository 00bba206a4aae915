"""The MODEL argument of evaluate.py, resolved to a base model, an adapter and a config.

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
from typing import Any

from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.peft_folder import CONFIG as ADAPTER_CONFIG
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.cluster.decide import LENGTH
from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import UserError, as_user_error
from olora_ray.config import command_line
from olora_ray.config.load import override, read_config, with_model
from olora_ray.config.schema import NO_GATE, AnyConfig, Config
from olora_ray.config.section import is_auto
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import find_model, parts
from olora_ray.pipeline.run_folder import RunFolder, read_decisions, read_for_others, where_now
from olora_ray.tracking import models
from olora_ray.tracking.start import resolve_uri
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import Checkpoint
from olora_ray.train.scoring import built_in

logger = logging.getLogger(__name__)

SETTINGS = "config.yaml"


@dataclass(frozen=True)
class Target:
    name: str
    """The name on the command line."""
    base: BaseModel
    adapter: str | None
    """Folder of a plain LoRA for the base."""
    config: AnyConfig
    """The settings of the evaluation, with the base as `model`."""
    version: models.Registered | None = None
    """The registered version, if it is one."""
    run_id: str | None = None
    """The MLflow run of a finished training."""


def settings(names: Sequence[str], file: str | None, changes: Mapping[str, Any]) -> AnyConfig:
    """Return the settings of the file, otherwise of the first model that belongs to a run, otherwise the defaults.

    The first registered version belongs to the run that made it, if no other model belongs to one.

    Raises UserError for a wrong config, a path that does not exist, or a scorer in Python that only the run's config
    names: its code runs only if this call names it.
    """
    for name in names:
        _refuse_nowhere(name)
    config = _settings(names, file, changes)
    quantization = config.model.quantization
    if quantization != "none":
        logger.info(
            f"model.quantization={quantization}: ignored; models are evaluated with their stored weights"
        )
        return override(config, {"model.quantization": "none"})
    return config


def settings_of_version(uri: str, changes: Mapping[str, Any]) -> AnyConfig:
    """Return the settings of the run that made a registered version.

    The defaults with the version as model instead, if its folder has no longer that run.
    """
    config = command_line.loaded_for(uri, changes)
    tracking_uri = resolve_uri(config)
    version = models.resolve(uri, tracking_uri)
    folder = where_now(version.folder, config.run.storage)
    result = records.read(RunFolder(folder).result, dict[str, Any]) or {}
    if not folder or (result.get("mlflow") or {}).get("run_id") != version.run_id:
        return config
    own = settings([folder], None, changes)
    here = {
        "run.storage": config.run.storage,
        "tracking.uri": tracking_uri,
        "model.trust_remote_code": config.model.trust_remote_code,  # the registry may name any folder
    }
    return override(own, here)


def _settings(names: Sequence[str], file: str | None, changes: Mapping[str, Any]) -> AnyConfig:
    if file is not None:
        config = command_line.loaded(file, {**NO_GATE, **changes})
        if is_auto(config.data.max_length):
            # `init` writes auto; the run of this config, if it has begun, has decided the number.
            decision = read_decisions(config.folder()).get(LENGTH)
            if decision:
                return override(config, {LENGTH: decision.value})
        return config
    run = next(filter(None, map(run_of, names)), None)
    if run is not None:
        own = read_for_others(run)
        parent, _, name = run.rpartition("/")
        # The user has moved the run's storage, so the config still names the old path.
        moved = {}
        if name == own.run.name and run != own.folder():
            moved = {"run.storage": parent}
        scorer = own.evaluation.scorer
        if scorer and not built_in(scorer) and "evaluation.scorer" not in changes:
            raise UserError(
                f"evaluation.scorer: the config in {run} names the Python code {scorer}, and others may write there; if"
                f" you trust that code, add --scorer {scorer}, or name your own config with --config"
            )
        return override(own, {**moved, **NO_GATE, **changes})
    version = next((name for name in names if name.startswith(models.SCHEME)), None)
    if version is not None:
        return settings_of_version(version, changes)
    return command_line.loaded_for(names[0], changes)


def _refuse_nowhere(name: str) -> None:
    """Raise UserError for a path that does not exist.

    A name with a single slash is a hub id, unless its first part is a folder, or is that of runs.
    """
    path = _absolute(name)
    if not path or storage.is_uri(path) or storage.exists(path):
        return
    parent = Path(path).parent
    is_path = name.startswith(("/", ".", "~", "runs/")) or name.strip("/").count("/") != 1
    if is_path or parent.is_dir():
        siblings: list[str] = []
        if "/" in name and parent.is_dir():
            siblings = sorted(each.name for each in parent.iterdir())
        hint = f"; {parent} has {', '.join(siblings[:8])}" if siblings else ""
        raise UserError(f"{name}: no such file or folder{hint}")


def run_of(name: str) -> str | None:
    """Return the folder of the run that a run, checkpoint or export belongs to; None if there is no such run.

    Raises UserError if the storage does not answer.
    """
    path = _absolute(name)
    if not path or not _readable(name, path):
        return None
    for folder in (path, path.rsplit("/", 2)[0]):
        trained = _exists(folder, "checkpoints") or _exists(folder, "export")
        if trained and _exists(folder, SETTINGS):
            return folder
    return None


def resolve(name: str, shared: AnyConfig) -> Target:
    """Find the model, and download, convert or export what it needs.

    `shared` are the settings of the evaluation; the result has them with another `model`. Raises UserError if nothing
    has this name, or if the adapter belongs to another base model.
    """
    path = _absolute(name)
    if path and _readable(name, path):
        if _exists(path, checkpoint.MANIFEST) and _exists(path, checkpoint.ADAPTER):
            saved = checkpoints.read(path)
            own = read_config(storage.join(path, SETTINGS))
            return _of_checkpoint(name, saved, saved.adapter, own, shared)
        if _exists(path, ADAPTER_CONFIG):
            return _of_adapter(name, path, shared)
        if _exists(path, SETTINGS) and not _exists(path, "config.json"):
            return _of_run(name, path, shared)
    config = _with_model(shared, name)
    version = models.of_config(config)
    if version is None:
        return Target(name, find_model(config), None, config)
    if version.base is None:
        return Target(name, find_model(config, version), None, config, version)
    config, base, adapter = parts(version, version.base, config)
    return Target(name, base, adapter, config, version)


def _of_run(name: str, root: str, shared: AnyConfig) -> Target:
    # From the path, because the folder may have been moved or renamed.
    storage_path, _, run = root.rpartition("/")
    own = override(read_for_others(root), {"run.storage": storage_path, "run.name": run})
    folder = RunFolder(own.folder())
    newest = checkpoints.latest_good(folder.checkpoints)
    done = folder.state().finished(own)
    result = done or {}
    run_id = (result.get("mlflow") or {}).get("run_id")
    if done or (newest and folder.exported(own, newest[1].state.step)):
        if own.export.merged and _exists(folder.merged, "config.json"):
            config = _with_model(shared, folder.merged)
            return Target(name, find_model(config), None, config, run_id=run_id)
        known = (result.get("base") or {}).get("digest")
        if newest:
            known = newest[1].identity.get("base model")
        base, config = base_of(name, known, own, shared)
        return Target(name, base, folder.adapter, config, run_id=run_id)
    if newest is None:
        raise UserError(
            f"{name}: this run has no export and no complete checkpoint yet; train it first"
        )
    logger.info(
        f"{name}: not exported yet; evaluating its best adapter up to step {newest[1].state.step}"
    )
    return _of_checkpoint(name, newest[1], newest[1].best_adapter(), own, shared)


def base_of(
    name: str, known: str | None, own: Config, shared: AnyConfig
) -> tuple[BaseModel, AnyConfig]:
    """Return the base of a run and the settings with it; raises UserError if its digest is no longer `known`."""
    config = _with_model(shared, own.model.name, own.model.revision)
    base = find_model(config)
    if known != base.digest:
        raise UserError(
            f"{name}: its base model {own.model.name} has changed since the training; set model.revision"
        )
    return base, config


def _of_checkpoint(
    name: str,
    saved: Checkpoint,
    adapter: Mapping[str, AdapterWeights],
    own: Config,
    shared: AnyConfig,
) -> Target:
    base, config = base_of(name, saved.identity.get("base model"), own, shared)
    text = json.dumps([name, saved.state.step, saved.identity, own.adapter.identity()])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = storage.join(
        config.run.storage, "adapters", f"{Path(name).name}-{saved.state.step}-{key}"
    )
    with node_cache.local_folder(path) as folder:
        write_adapter(adapter, own.adapter, base.folder, folder, skeleton(base, config.model))
    return Target(name, base, path, config)


def _of_adapter(name: str, path: str, shared: AnyConfig) -> Target:
    run = run_of(name)
    if run is not None:
        model = read_config(storage.join(run, SETTINGS)).model
        config = _with_model(shared, model.name, model.revision)
    else:
        fields = records.read(storage.join(path, ADAPTER_CONFIG), dict[str, Any]) or {}
        if "base_model_name_or_path" not in fields:
            raise UserError(
                f"{path}/{ADAPTER_CONFIG}: no base_model_name_or_path; set it to the base model"
            )
        base = str(fields["base_model_name_or_path"])
        config = _with_model(shared, base, fields.get("revision"))
    return Target(name, find_model(config), path, config)


def _with_model(shared: AnyConfig, name: str, revision: str | None = None) -> AnyConfig:
    if not revision and shared.model.name == name:
        revision = shared.model.revision
    return command_line.resolved(with_model(shared, name, revision or None))


def _absolute(name: str) -> str:
    if name.startswith(("models:/", "package://", "hf://")):
        return ""
    return command_line.job_path(name).rstrip("/")


def _readable(name: str, path: str) -> bool:
    if storage.is_uri(path) and ".." in path.partition("?")[0].split("/"):
        raise UserError(f"{name}: '..' does not work in a URI; write the URI without it")
    with as_user_error(f"{name}: cannot be read", OSError, ValueError):
        return storage.exists(path)


def _exists(folder: str, name: str) -> bool:
    return storage.exists(storage.join(folder, name))
