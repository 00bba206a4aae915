"""The settings of a search and its folder: all that is decided before anything is loaded.

<storage>/<name>/search.json    the settings, the space and the contents that a search was begun with
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olora_ray.cluster import address
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.load import build, flatten, leaves, override
from olora_ray.config.schema import NO_GATE, Config
from olora_ray.pipeline import publish
from olora_ray.pipeline.run_folder import RunFolder, bound_settings
from olora_ray.sweep import state
from olora_ray.sweep.space import Space
from olora_ray.train import checkpoint

_FILE = "search.json"
_CHANGES = 3  # settings that are told, where a search of this name has others
_ABSENT = object()
_SHOWN = 120  # characters of a setting that are told


def search_config(config: Config, space: Space, space_file: str | Path, registers: bool) -> Config:
    """The config of the search: under the name `<run.name>-<name of the space file>`, with what the space sets.

    A range of workers becomes a fixed number, its smallest. Raises UserError if `registers` and no name is given.
    """
    if registers and config.registry.model is None:
        raise UserError("registry.model: not set, so there is no name to register the best model under")
    if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-]", Path(space_file).stem):
        raise UserError(
            f"space file {space_file}: its name becomes a part of the search's; rename it to letters, digits, '.', '_'"
            " and '-'"
        )
    own = {"run.name": f"{config.run.name}-{Path(space_file).stem}", "cluster.workers": config.cluster.min_workers()}
    if space.trials_per_worker > 1:
        own |= {"cluster.workers": 1}
    return override(config, {**NO_GATE, **space.set, **own})


def check(config: Config, space: Space) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or what has this name is no search to resume."""
    folder = RunFolder(config)
    folder.check()
    publish.check_tracking(config, folder)
    place = storage.join(folder.root, _FILE)
    if storage.exists(place):
        _refuse_other_settings(folder.root, storage.read_text(place), description(config, space))
    state.can_resume(folder.root)
    address.find()


def _refuse_other_settings(folder: str, old: str, new: str) -> None:
    changed = _changes(old, new)
    if changed:
        shown = ", ".join(changed[:_CHANGES]) + (", ..." if len(changed) > _CHANGES else "")
        raise UserError(
            f"run.name: {folder} holds a search with different settings ({shown}); choose another run.name or space"
            " file, or delete it"
        )


def _changes(old: str, new: str) -> list[str]:
    """What differs between two descriptions of a search, as `field was 1, is 2`; its place alone if that is long."""
    try:
        before, after = (_bound(json.loads(text)) for text in (old, new))
    except (ValueError, TypeError, KeyError, AttributeError):
        return [f"{_FILE} cannot be read"]
    found, added = [], _defaults()
    for field in sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        if field not in before and after[field] == added.get(re.sub(r"\.\d+\.", ".0.", field), _ABSENT):
            continue  # of a version that did not have the setting yet
        was, now = (repr(values[field]) if field in values else "not there" for values in (before, after))
        found.append(f"{field} was {was}, is {now}" if len(was + now) <= _SHOWN else f"{field} differs")
    return found


def begin(config: Config, space: Space, contents: Mapping[str, str]) -> None:
    """Keep what the search is begun with: from now on its folder is its own.

    `contents` are the digests of model and data by their names in a checkpoint's identity. Raises UserError if it was
    begun with others; those of a search of before they were kept are not looked at.
    """
    folder = config.folder()
    place = storage.join(folder, _FILE)
    kept = json.loads(storage.read_text(place)).get("contents", {}) if storage.exists(place) else {}
    checkpoint.require_same({**contents, **kept}, contents, folder)
    storage.write_text(place, description(config, space, contents))


def description(config: Config, space: Space, contents: Mapping[str, str] | None = None) -> str:
    """The text of search.json: what two attempts of a search must have in common."""
    # How many trials there are, and how many at once, may change between two attempts.
    chosen = space.model_dump(exclude={"concurrency", "time_budget", "patience", "min_improvement"})
    described = {"config": bound_settings(flatten(config)), "space": chosen, "contents": dict(contents or {})}
    return json.dumps(described, indent=1, sort_keys=True) + "\n"


def _bound(description: dict[str, Any]) -> dict[str, Any]:
    """The settings and the space of a description, flat; an older one may have more of them."""
    return dict(leaves({"config": bound_settings(description["config"]), "space": description["space"]}, ""))


def _defaults() -> dict[str, object]:
    """`config.FIELD` -> its default; of a source as `config.data.train.0.FIELD`."""
    smallest = build({"run": {"name": "x"}, "model": {"name": "x"}, "data": {"train": [{"path": "x"}]}})
    return {f"config.{field}": value for field, value in flatten(smallest).items()}
