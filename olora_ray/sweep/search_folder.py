"""The folder of a search: what it was begun with, how far it is, and the state from which Ray Tune resumes it.

<storage>/<name>/search.json      the settings, the space and the contents that it was begun with
<storage>/<name>/progress.json    how long it has run, over all attempts, and whether it is complete
<storage>/<name>/tune/            Tune's own files: pickles that name classes and functions of olora_ray.sweep
"""

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from olora_ray.cluster import address
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.config.load import flatten, leaves, override
from olora_ray.config.schema import NO_GATE, Config
from olora_ray.pipeline import publish
from olora_ray.pipeline.run_folder import RunFolder, bound_settings
from olora_ray.sweep.space import Space
from olora_ray.train import checkpoint

TUNE = "tune"
_BEGUN_WITH = "search.json"
_PROGRESS = "progress.json"


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
    workers = 1 if space.trials_per_worker > 1 else config.cluster.min_workers()
    own = {"run.name": f"{config.run.name}-{Path(space_file).stem}", "cluster.workers": workers}
    return override(config, {**NO_GATE, **space.set, **own})


def check(config: Config, space: Space) -> None:
    """Raise UserError if storage, MLflow or Ray cannot be used, or what has this name is no search to resume."""
    folder = RunFolder(config)
    folder.check()
    publish.check_tracking(config, folder)
    place = storage.join(folder.root, _BEGUN_WITH)
    if storage.exists(place) and (changed := _changes(storage.read_text(place), description(config, space))):
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise UserError(
            f"run.name: {folder.root} holds a search with different settings ({shown}); choose another run.name or"
            " space file, or delete it"
        )
    address.find()


def _changes(old: str, new: str) -> list[str]:
    """What differs between two descriptions of a search, as `field was 1, is 2`; its place alone if that is long."""
    try:
        trees = [json.loads(text) for text in (old, new)]
        before, after = (dict(leaves({part: tree[part] for part in ("config", "space")}, "")) for tree in trees)
    except (ValueError, TypeError, KeyError, AttributeError):
        return [f"{_BEGUN_WITH} cannot be read"]
    found = []
    for field in sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        was, now = (repr(values[field]) if field in values else "not there" for values in (before, after))
        found.append(f"{field} was {was}, is {now}" if len(was + now) <= 120 else f"{field} differs")
    return found


def begin(config: Config, space: Space, contents: Mapping[str, str]) -> None:
    """Keep what the search is begun with: from now on its folder is its own.

    `contents` are the digests of model and data by their names in a checkpoint's identity. Raises UserError if it was
    begun with others.
    """
    folder = config.folder()
    place = storage.join(folder, _BEGUN_WITH)
    kept = json.loads(storage.read_text(place)).get("contents", {}) if storage.exists(place) else {}
    checkpoint.require_same({**contents, **kept}, contents, folder)
    storage.write_text(place, description(config, space, contents))


def description(config: Config, space: Space, contents: Mapping[str, str] | None = None) -> str:
    """The text of search.json: what two attempts of a search must have in common."""
    # How many trials run at once, and when the search ends, may change between two attempts.
    chosen = space.model_dump(exclude={"concurrency", "time_budget", "patience", "min_improvement"})
    described = {"config": bound_settings(flatten(config)), "space": chosen, "contents": dict(contents or {})}
    return json.dumps(described, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Progress:
    """What a search's folder says of the search as a whole."""

    seconds: float = 0.0
    """From start to end, or to the last trial that started or ended; time between two attempts does not count."""
    complete: bool = False
    """Whether the search is over, so that there is nothing left to run."""
    note: str = ""
    """Why it ended before all trials did, if so."""
    cut: tuple[int, ...] = ()
    """Numbers of the trials that its end has cut."""


def progress(folder: str) -> Progress:
    """The progress of the search in `folder`; that of a new one if there is none, or it is damaged."""
    try:
        return TypeAdapter(Progress).validate_json(storage.read_text(storage.join(folder, _PROGRESS)))
    except (OSError, ValueError):
        return Progress()


def keep(folder: str, progress: Progress) -> None:
    """Write the progress of the search in `folder`."""
    storage.write_text(storage.join(folder, _PROGRESS), json.dumps(asdict(progress)) + "\n")


def tune_place(folder: str) -> str:
    """Tune's folder in that of the search."""
    return storage.join(folder, TUNE)


def lost(folder: str) -> bool:
    """Whether Tune has begun a search and left nothing to resume from: it was killed before that, or in a write."""
    names = storage.names(place := tune_place(folder))
    if "tuner.pkl" not in names:  # without it Tune begins anew
        return False
    # One for each attempt; Tune resumes from the last of them by name.
    states = fnmatch.filter(names, "experiment_state-*.json")
    try:
        return not states or not json.loads(storage.read_text(storage.join(place, max(states))))["trial_data"]
    except (ValueError, KeyError, TypeError):
        return True


def not_resumed(folder: str) -> UserError:
    """What to raise for a search that Tune cannot resume, which it says in its own log alone."""
    return UserError(
        f"run.name: Ray Tune cannot resume the search in {folder}: what it has kept is damaged, or of another version"
        " of olora_ray, Ray or Optuna; choose another run.name (the trials of this one stay readable under"
        f" {storage.join(folder, 'trials')}), or delete the folder"
    )
