"""The settings of a search, its folder, and who works in it: all that is decided before anything is loaded.

<storage>/<name>/search.json    the settings and the space that a search was begun with
<storage>/locks/                who works on it
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from olora_ray.cluster import address
from olora_ray.common import lock, storage
from olora_ray.common.errors import UserError
from olora_ray.config.dotted import flatten, leaves
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.pipeline import mlflow_run
from olora_ray.pipeline.run_folder import FREE_TO_CHANGE, RunFolder
from olora_ray.sweep import state
from olora_ray.sweep.space import Space

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
    return override(config, {**space.set, **own})


def check(config: Config, space: Space) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or what has this name is no search to resume."""
    folder = RunFolder(config)
    folder.check()
    mlflow_run.check_tracking(config, folder)
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
        before, after = (dict(leaves(json.loads(text), "")) for text in (old, new))
    except ValueError:
        return [f"{_FILE} cannot be read"]
    found, added = [], _defaults()
    for field in sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        if field not in before and after[field] == added.get(re.sub(r"\.\d+\.", ".0.", field), _ABSENT):
            continue  # of a version that did not have the setting yet
        was, now = (repr(values[field]) if field in values else "not there" for values in (before, after))
        found.append(f"{field} was {was}, is {now}" if len(was + now) <= _SHOWN else f"{field} differs")
    return found


@contextlib.contextmanager
def only_driver(config: Config) -> Iterator[None]:
    """Work on the search for the block; raises TryAgain if another process does."""
    place = storage.join(config.run.storage, "locks", f"search-{config.run.name}.json")
    with lock.held(place, f"the search {config.run.name}", remedy="choose another run.name"):
        yield


def begin(config: Config, space: Space) -> None:
    """Keep what the search is begun with: from now on its folder is its own."""
    storage.write_text(storage.join(config.folder(), _FILE), description(config, space))


def description(config: Config, space: Space) -> str:
    """The text of search.json: what two attempts of a search must have in common."""
    settings = {name: value for name, value in flatten(config).items() if not name.startswith(FREE_TO_CHANGE)}
    # How many trials there are, and how many at once, may change between two attempts.
    chosen = space.model_dump(exclude={"concurrency", "time_budget", "patience", "min_improvement"})
    return json.dumps({"config": settings, "space": chosen}, indent=1, sort_keys=True) + "\n"


def _defaults() -> dict[str, object]:
    """`config.FIELD` -> its default; of a source as `config.data.train.0.FIELD`."""
    smallest = build({"run": {"name": "x"}, "model": {"name": "x"}, "data": {"train": [{"path": "x"}]}})
    return {f"config.{field}": value for field, value in flatten(smallest).items()}
