"""A storage that was moved or copied: MLflow's SQLite database in it has absolute paths of the artifacts.

Nothing corrects them at a start. A start or a load that meets such a path names the command that does:

    olora-ray registry moved OLD NEW
"""

import contextlib
import os
import shlex
import sqlite3
from pathlib import Path

from olora_ray.common.errors import UserError

FOLDER = "mlartifacts"
DATABASE = "mlflow.db"
SQLITE = "sqlite:///"
# The columns in which MLflow 3.17 stores paths of artifacts. It has no call to change them.
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def relocate_artifacts(old: str, new: str, uri: str) -> int:
    """Replace the folder `old` by `new` in all paths of artifacts; return the number of changed paths.

    Raises UserError if the MLflow at `uri` is no SQLite database, if the database cannot be written, or if no artifact
    lies below `old`.
    """
    if not uri.startswith(SQLITE):
        raise UserError(
            "registry moved: only an SQLite database can be corrected; a server keeps the addresses of artifacts itself"
        )
    old = os.path.abspath(old)
    new = os.path.abspath(new)
    file = Path(uri.removeprefix(SQLITE)).absolute()
    if not file.is_file():
        raise UserError(f"registry moved: {file} is missing; give --tracking-uri")
    changed = 0
    try:
        with contextlib.closing(
            sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=30)
        ) as database:
            with database:
                for table, column in COLUMNS:
                    changed += database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608  # names of ours
                        f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                    ).rowcount
            rows = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    except sqlite3.DatabaseError as error:
        raise UserError(f"registry moved: {file} cannot be changed: {error}") from None
    if not changed:
        known = ", ".join(sorted(str(place) for (place,) in rows)) or "none"
        raise UserError(
            f"registry moved: no artifact in {file} lies below {old}; its experiments lie in: {known}"
        )
    return changed


def command(place: str, uri: str) -> str:
    """Return the command that corrects an artifact's path `place`; empty unless it lies in another storage."""
    storage, found, _ = f"{place.removeprefix('file://')}/".partition(f"/{FOLDER}/")
    folder, _, name = uri.removeprefix(SQLITE).rpartition("/")
    if not found or not uri.startswith(SQLITE) or storage == folder:
        return ""
    new = shlex.quote(folder) if name == DATABASE else "NEW"
    return f"olora-ray registry moved {shlex.quote(storage)} {new}"


def advice(place: str, uri: str) -> str:
    """Return what to do if artifacts are missing at `place` because their storage was moved; empty if it was not."""
    correct = command(place, uri)
    return f"; if the storage was moved, run: {correct}" if correct else ""


def refuse_moved(location: str, uri: str) -> None:
    """Raise UserError if `location`, of an experiment in a storage's own database, lies where the storage was before.

    Otherwise MLflow would write into the earlier folder. Artifacts that lie in another folder on purpose are written
    there: it exists, and has no database beside it.
    """
    now = os.path.join(os.path.dirname(uri.removeprefix(SQLITE)), FOLDER)
    if os.path.basename(location) != FOLDER or os.path.realpath(location) == os.path.realpath(now):
        return
    beside = os.path.join(os.path.dirname(location), DATABASE)
    if os.path.isdir(location) and not os.path.isfile(beside):
        return
    raise UserError(
        f"run.storage was moved: MLflow still expects its artifacts in {location}; run {command(location, uri)}, and"
        " then the same command again"
    )
