"""List what a storage has: runs, searches, comparisons. Nothing is written or started.

    olora-ray runs [STORAGE]        a folder or URI, as in run.storage; without it ./runs

Each line has a name, its state, the steps that are done and asked for, the held-out loss before and after, the
registered version, the model, the data, and the time of the last change. The newest is the last.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from olora_ray.common import lock, storage
from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import aligned
from olora_ray.config import command_line
from olora_ray.config.schema import IN_STORAGE

HEAD = ("name", "state", "steps", "loss", "version", "model", "data", "changed")
KINDS = {"search.json": "search", "compare.json": "comparison", "config.yaml": "run", "checkpoints": "run"}
"""A file or folder -> what has it."""
ENDS = {"search": "best.yaml", "comparison": "comparison.json", "run": "result.json"}
"""The last file of each."""


def main(argv: list[str]) -> None:
    """Print the table."""
    places = command_line.parse(argv, usage=__doc__ or "").words
    if len(places) > 1:
        raise UserError(f"arguments {' '.join(places)}: one storage at a time")
    place = command_line.absolute(places[0] if places else "runs", Path.cwd())
    with as_user_error(f"{place}: cannot be read", OSError, reason=short_reason):
        lines = table(place)
    print("\n".join(lines) or f"no runs in {place}")


def table(storage_root: str) -> list[str]:
    """The lines of the table, its head first; none if there are no runs. Raises OSError."""
    names = [name for name in storage.names(storage_root) if name not in IN_STORAGE and not name.startswith(".")]
    with ThreadPoolExecutor(16) as pool:  # each is some requests to an object store
        rows = sorted(filter(None, pool.map(partial(_row, storage_root), names)))
    return aligned([HEAD, *(cells for _, cells in rows)]) if rows else []


def _row(root: str, name: str) -> tuple[float, tuple[str, ...]] | None:
    """The time of a folder's last change, and its cells; None for what is none of ours."""
    place = storage.join(root, name)
    try:
        times = storage.times(place)
    except NotADirectoryError:
        return None
    kind = next((kind for file, kind in KINDS.items() if file in times), None)
    if kind is None:
        return None
    changed, state = max(times.values()), "finished" if ENDS[kind] in times else "interrupted"
    if state == "interrupted" and lock.is_held(storage.join(root, "locks", "runs", f"{name}.json")):
        state = "running"
    cells = _of_run(place, state) if kind == "run" else [f"{kind}, {state}"]
    cells += ["-"] * (len(HEAD) - 2 - len(cells))
    return changed, (name, *cells, time.strftime("%Y-%m-%d %H:%M", time.localtime(changed)))


def _of_run(place: str, state: str) -> list[str]:
    """The cells of a run from its state to its data; `damaged: FILE` alone if a file of it cannot be read."""
    file = "config.yaml"
    try:
        text = storage.read_text(storage.join(place, file))
        # The loader of configs takes ten times as long.
        config: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are
        train, (first, *more) = config["train"], config["data"]["train"]
        length = f"/{train['steps']}" if train["steps"] else f" ({train['epochs']:g} epochs)"
        where = [_last(config["model"]["name"]), _last(first["path"]) + (f" +{len(more)}" if more else "")]
        kind = "retraining, " if config["registry"]["alias"] == "challenger" else ""
        file = ENDS["run"]
        result = json.loads(storage.read_text(storage.join(place, file))) if state == "finished" else {}
        losses = (result.get("eval_loss_before"), result.get("metrics", {}).get("eval/loss"))
        shown = " > ".join("-" if loss is None else f"{loss:.4f}" for loss in losses)
        version = f"{made['model']}/{made['version']}" if (made := result.get("registered")) else "-"
        names = storage.names(storage.join(place, "checkpoints"))
        done = result.get("steps") or max((int(each[5:]) for each in names if each[5:].isdecimal()), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return [f"damaged: {file}"]
    return [f"{kind}{state}{' early' * bool(result.get('stopped_early'))}", f"{done}{length}", shown, version, *where]


def _last(place: str) -> str:
    """The last part of a path; a name as it is."""
    return place.rpartition("/")[2] if place.startswith("/") else place
