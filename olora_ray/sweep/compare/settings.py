"""The folder of a comparison: that it can be used, and that it is this comparison's.

<storage>/<name>/compare.json    the settings and the contents that a comparison was begun with
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from olora_ray.cluster import address
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.text import plural
from olora_ray.config.dotted import flatten
from olora_ray.pipeline import mlflow_run
from olora_ray.pipeline.run_folder import RunFolder, bound_settings
from olora_ray.sweep.compare.arguments import SEEDS, Comparison
from olora_ray.sweep.compare.spec import has_begun
from olora_ray.train import checkpoint

logger = logging.getLogger(__name__)

_FILE = "compare.json"


def check(comparison: Comparison) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or if this name is another comparison's."""
    config = comparison.config
    folder = RunFolder(config)
    folder.check()
    mlflow_run.check_tracking(config, folder)
    _refuse_other(comparison, {})
    address.find()
    if len(comparison.seeds) < SEEDS:
        logger.warning(f"--seeds {len(comparison.seeds)}: fewer than {SEEDS} say little; intervals will be wide")


def begin(comparison: Comparison, contents: Mapping[str, str]) -> None:
    """Keep what the comparison is begun with: once it has a trial, its folder is its own.

    `contents` are digests of model and rows by their names. Raises UserError if it was begun with others.
    """
    _refuse_other(comparison, contents)
    folder = comparison.config.folder()
    text = json.dumps(_description(comparison, contents), indent=1, sort_keys=True) + "\n"
    place = storage.join(folder, _FILE)
    if has_begun(folder) or (storage.exists(place) and storage.read_text(place) == text):
        return
    storage.remove(storage.join(folder, "shared"))  # factors of an attempt with other settings
    storage.write_text(place, text)


def _refuse_other(comparison: Comparison, contents: Mapping[str, str]) -> None:
    folder = comparison.config.folder()
    place = storage.join(folder, _FILE)
    if not (has_begun(folder) and storage.exists(place)):
        return
    try:
        kept = json.loads(storage.read_text(place))
        before, now = _flat(kept), _flat(_description(comparison, contents))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{place}: cannot be read; put it back, or delete {folder}") from None
    checkpoint.require_same({**contents, **kept.get("contents", {})}, contents, folder)
    if changed := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
        shown = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed[:3])
        raise UserError(
            f"run.name: {folder} holds a comparison with {plural(len(changed), 'other setting')} ({shown}): what is"
            " compared is fixed before it begins; choose another run.name, or delete the folder"
        )


def _description(comparison: Comparison, contents: Mapping[str, str]) -> dict[str, Any]:
    settings = bound_settings(flatten(comparison.config))
    fixed = {f"compare.{name}": value for name, value in comparison.config.compare.model_dump().items()}
    group = {"gate.group": comparison.config.gate.group}
    named = {"--methods": list(comparison.methods), "--seeds": len(comparison.seeds)}
    return {"settings": {**settings, **fixed, **group, **named}, "contents": dict(contents)}


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    return dict(description["settings"])
