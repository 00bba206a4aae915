"""Delete what a storage no longer needs: run folders, token stores, and copies
of models.

    olora-ray prune STORAGE --older DAYS [--dry-run] [--tracking-uri URI]

STORAGE         a folder or URI as in run.storage
--older         only what has not changed for so many days, such as 30d
--dry-run       only print what would be deleted
--tracking-uri  as for `olora-ray registry`; default: MLFLOW_TRACKING_URI, else
                STORAGE/mlflow.db

A run folder stays while its run is at work, while its version is in use (an
alias, the last champion, the best champions with which the gate compares), and
while another run, search or comparison names it. A token store stays while one
of these uses it, or while anything is at work. Searches, comparisons and all
that MLflow has stay. After a kill the same command completes what it has begun.
"""

import os
import re
import time
from pathlib import Path

from olora_ray.common import lock, storage
from olora_ray.common.errors import TryAgain, UserError, as_user_error, short_reason
from olora_ray.common.logs import quiet_environment
from olora_ray.config import command_line
from olora_ray.config.schema import IN_STORAGE
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tracking import old_versions, start

CACHES = ("tokens", "models")
"""Folders of a storage whose entries are made again when they are needed."""
COPY = re.compile("(merged-)?[0-9a-f]{16,32}")
SEARCHES = ("search.json", "compare.json")
TELLING = ("config.yaml", "state.json", *SEARCHES)
"""Files that name what a run, search or comparison uses; a finished run names it in result.json."""
MARK = "tracking.json"
"""The file that makes a folder a run; a user's own folder beside the runs has none. It is deleted last."""


def main(argv: list[str]) -> None:
    parsed = command_line.parse(
        argv or ["--help"],
        usage=__doc__ or "",
        flags=["--dry-run"],
        options=["--older", "--tracking-uri"],
    )
    older = re.fullmatch("([1-9][0-9]{0,4})d?", parsed.options.get("--older", ""))
    if older is None or len(parsed.words) != 1:
        raise UserError("usage: olora-ray prune STORAGE --older 30d [--dry-run]")
    quiet_environment()
    root = command_line.absolute(parsed.words[0], Path.cwd())
    uri = parsed.options.get("--tracking-uri")
    if uri is None and start.VARIABLE not in os.environ:
        uri = f"sqlite:///{root}/mlflow.db"
    if not storage.exists(root):
        raise UserError(f"{root}: no such storage")
    before = time.time() - 86400 * int(older[1])
    with as_user_error(f"{root}: cannot be pruned", OSError, reason=short_reason):
        freed = prune(root, before, start.chosen_uri(uri), bool(parsed.flags))
    print(f"{freed:,} bytes {'would be deleted' if parsed.flags else 'deleted'}")


def prune(root: str, before: float, uri: str, dry: bool) -> int:
    """Delete what is older than `before` and has no use, or only print it; return its bytes."""
    told = {}
    for name in storage.names(root):
        if name not in IN_STORAGE and storage.size(storage.join(root, name)) is None:
            told[name] = _told(storage.join(root, name))
    names = [*told]
    for folder in CACHES:
        copies = filter(COPY.fullmatch, storage.names(storage.join(root, folder)))
        names += [f"{folder}/{name}" for name in copies]
    freed = 0
    for name in names:
        files, changed = storage.usage(storage.join(root, name))
        is_run = MARK in files and not files.keys() & set(SEARCHES)
        if changed > before or (name in told and not is_run):
            continue
        use = _use(root, name, "".join(told.values()), uri)
        if not use and not dry:
            use = _delete(root, name)
        size = sum(files.values())
        print(f"{name}: {use or f'{size:,} bytes'}")
        if not use:
            freed += size
            told.pop(name, None)
    return freed


def _told(folder: str) -> str:
    """Return the texts in which a run, search or comparison names what it uses."""
    files = storage.files_below(folder)
    telling = ("result.json",) if "result.json" in files else TELLING
    wanted = [file for file in files if file.endswith(telling)]
    return "".join(storage.read_text(storage.join(folder, file)) for file in wanted)


def _use(root: str, name: str, told: str, uri: str) -> str:
    """Return what a folder is used for; empty if it may go."""
    parent, _, entry = name.rpartition("/")
    if (entry if parent else f"/{name}/") in told:
        return "stays, because a run, search or comparison names it"
    if parent:
        return "stays, because something is at work here" if _at_work(root) else ""
    run_id = RunFolder(storage.join(root, name)).tracking_run(uri, root)
    if run_id is None:
        return "stays, because it was logged to another MLflow; give --tracking-uri"
    if old_versions.made_one_in_use(uri, run_id):
        return "stays, because its version is in use"
    return ""


def _at_work(root: str) -> bool:
    locks = storage.join(root, "locks")
    return any(lock.is_held(storage.join(locks, file)) for file in storage.files_below(locks))


def _delete(root: str, name: str) -> str:
    """Delete a folder; return why it stays, if a run works in it."""
    place = storage.join(root, name)
    # Without its result a run does not look finished, and a manifest precedes the shards of its token store.
    order = sorted(storage.names(place), key=lambda each: (each == MARK, each != "result.json"))
    try:
        with lock.held(storage.join(root, "locks", "runs", f"{Path(name).name}.json"), name):
            for each in order:
                storage.remove(storage.join(place, each))
            storage.remove(place)
    except TryAgain as busy:
        return f"stays: {busy}"
    return ""
