"""The folder of a search: its settings, its progress, and the state from which Ray Tune resumes it.

<storage>/<name>/search.json      settings, space and digests of the contents that the search started with
<storage>/<name>/progress.json    how long it has run, over all attempts, and whether it is complete
<storage>/<name>/tune/            Tune's own files: pickles that name classes and functions of olora_ray.sweep
"""

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from olora_ray.cluster import address
from olora_ray.common import records, storage
from olora_ray.common.errors import UserError
from olora_ray.config.decided import NOTHING, DecidedConfig, Decisions, Kept
from olora_ray.config.load import flatten, leaves, override
from olora_ray.config.schema import NO_GATE, Config
from olora_ray.pipeline import publish
from olora_ray.pipeline.run_folder import (
    RunFolder,
    identity_settings,
)
from olora_ray.sweep.space import Space
from olora_ray.train import checkpoint

TUNE = "tune"
_BEGUN_WITH = "search.json"
_PROGRESS = "progress.json"


def search_config(config: Config, space: Space, space_file: str | Path, registers: bool) -> Config:
    """Return the config of the search: the user's, with what the space sets.

    Its run.name is `<run.name>-<name of the space file>`. A range of workers becomes its smallest number. Raises
    UserError if `registers` is true and registry.model is not set.
    """
    if registers and config.registry.model is None:
        raise UserError(
            "registry.model: not set; set the name under which the best model is registered"
        )
    workers = 1 if space.trials_per_worker > 1 else config.cluster.each_trial()
    own = {"run.name": f"{config.run.name}-{Path(space_file).stem}", "cluster.workers": workers}
    return override(config, {**NO_GATE, **space.set, **own})


def check_search(config: Config, space: Space) -> Kept:
    """Return what earlier attempts have decided.

    Raise UserError if storage, MLflow or Ray cannot be used, or if the folder holds a different search."""
    folder = RunFolder(config.folder())
    folder.check(config)
    publish.check_tracking(config, folder)
    path = storage.join(folder.root, _BEGUN_WITH)
    begun = records.read(path, Begun)
    kept = NOTHING
    if begun is not None:
        kept = Kept(begun.config, folder.decisions())
    if storage.exists(path):
        changes = _changes(begun, description(kept.filled(config), space))
        if len(changes) > 3:
            changes[3:] = ["..."]
        if changes:
            raise UserError(
                f"run.name: {folder.root} holds a search with different settings ({', '.join(changes)}); set another"
                " run.name, use another space file, or delete the folder"
            )
    address.find()
    return kept


@dataclass(frozen=True)
class Begun:  # search.json
    config: dict[str, Any]
    space: dict[str, Any]
    contents: dict[str, str]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def _changes(kept: Begun | None, described: Begun) -> list[str]:
    if kept is None:
        return [f"{_BEGUN_WITH} cannot be read"]
    read_back = records.parsed(described.text(), Begun)  # tuples are lists in JSON
    assert read_back is not None
    before = dict(leaves({"config": kept.config, "space": kept.space}, ""))
    after = dict(leaves({"config": read_back.config, "space": read_back.space}, ""))
    changes = []
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) == after.get(field):
            continue
        was = repr(before[field]) if field in before else "not set"
        now = repr(after[field]) if field in after else "not set"
        if len(was + now) <= 120:
            changes.append(f"{field} was {was}, is {now}")
        else:
            changes.append(f"{field} differs")
    return changes


def begin(
    config: DecidedConfig, space: Space, contents: Mapping[str, str], decisions: Decisions
) -> None:
    """Write decided.json and search.json: from now on the folder belongs to this search.

    `contents` are the digests of model and data, under their names in a checkpoint's identity. Raises UserError if the
    search started with other contents.
    """
    folder = config.folder()
    path = storage.join(folder, _BEGUN_WITH)
    kept = records.read(path, Begun)
    if kept is not None:
        checkpoint.require_same({**contents, **kept.contents}, contents, folder)
    RunFolder(folder).write_decisions(decisions)
    storage.write_text(path, description(config, space, contents).text())


def description(config: Config, space: Space, contents: Mapping[str, str] | None = None) -> Begun:
    # The number of concurrent trials and the limits of the search may change between two attempts.
    chosen = space.model_dump(exclude={"concurrency", "time_budget", "patience", "min_improvement"})
    return Begun(identity_settings(flatten(config)), chosen, dict(contents or {}))


@dataclass(frozen=True)
class Progress:
    """The progress of a search, over all its attempts. Its JSON form is progress.json."""

    seconds: float = 0.0
    """From start to end, or to the last trial that started or ended; without the time between attempts."""
    complete: bool = False
    """True if there is nothing left to run."""
    note: str = ""
    """Reason for an early end of the search; empty if all trials ended."""
    cut: tuple[int, ...] = ()
    """Numbers of the trials that were running when a limit ended the search."""


def progress(folder: str) -> Progress:
    """Return the progress of the search in `folder`; a new one if the file is missing or damaged."""
    return records.read(storage.join(folder, _PROGRESS), Progress) or Progress()


def keep(folder: str, progress: Progress) -> None:
    records.write(storage.join(folder, _PROGRESS), progress, end="\n")


def tune_place(folder: str) -> str:
    return storage.join(folder, TUNE)


def lost(folder: str) -> bool:
    """True if Tune started this search and has no usable state: it was killed too early, or during a write."""
    place = tune_place(folder)
    names = storage.names(place)
    if "tuner.pkl" not in names:  # without it Tune starts a new search
        return False
    # Each attempt writes its own file; Tune resumes from the one whose name sorts last.
    states = fnmatch.filter(names, "experiment_state-*.json")
    if not states:
        return True
    state = records.read(storage.join(place, max(states)), dict[str, Any])
    return not (state or {}).get("trial_data")


def not_resumed(folder: str) -> UserError:
    return UserError(
        f"run.name: Ray Tune cannot resume the search in {folder}: its state is damaged, or another version of"
        " olora_ray, Ray or Optuna wrote it; set another run.name (the old trials stay readable in"
        f" {storage.join(folder, 'trials')}), or delete the folder"
    )
