"""The database beside run.storage when the storage lies elsewhere than before: MLflow keeps paths of artifacts in it.

Without this a run that is resumed after `mv runs elsewhere` would log into the old folder, which MLflow makes again.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from olora_ray.common import storage
from olora_ray.config.evaluation import AnyConfig

logger = logging.getLogger(__name__)

FOLDER = "mlartifacts"
"""The artifacts' folder in run.storage."""
DATABASE = "mlflow.db"
"""The database's name there."""
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow 3.17 keeps a path of an artifact; it has no call to change one."""


def follow(config: AnyConfig) -> None:
    """Let the SQLite database in run.storage name the artifacts in run.storage.

    Those that lie somewhere else, and are not here, are left where they are. Does nothing without such a database.
    Call it before files are read, too: what the first run of the new place starts from may be registered.
    """
    if not storage.is_uri(config.run.storage):
        _follow(config.run.storage)


def follow_address(uri: str) -> None:
    """The same for the SQLite database at an address, if artifacts lie beside it."""
    place, _, name = uri.removeprefix("sqlite:///").rpartition("/")
    if uri.startswith("sqlite:////") and name == DATABASE and os.path.isdir(os.path.join(place, FOLDER)):
        _follow(place)


def _follow(place: str) -> None:
    file = Path(place) / DATABASE
    if not file.is_file():
        return
    now = os.path.join(os.path.abspath(place), FOLDER)
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=30)) as database:
        try:
            moved = [before for before in _roots(database) if before != now and _is_copied(database, before, now)]
        except sqlite3.DatabaseError:
            return  # none of MLflow yet, or none at all, which MLflow itself says better
        try:
            with database:
                for before in moved:
                    _rename(database, before, now)
        except sqlite3.DatabaseError as error:  # tables of another MLflow, or one that others hold for too long
            logger.warning(f"run.storage has moved, but MLflow's artifacts keep their places, {moved[0]}: {error}")
            return
    for before in moved:
        logger.info(f"run.storage has moved: MLflow's artifacts are in {now}, no longer in {before}")


def _rename(database: sqlite3.Connection, before: str, now: str) -> None:
    for table, column in COLUMNS:
        database.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608  # names of ours
            f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            (now, len(before) + 1, before, len(before) + 1, f"{before}/"),
        )


def _roots(database: sqlite3.Connection) -> list[str]:
    """The artifacts' folders of the experiments that were made for a run.storage."""
    found = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    return [place for (place,) in found if place and os.path.isabs(place) and os.path.basename(place) == FOLDER]


def _is_copied(database: sqlite3.Connection, before: str, now: str) -> bool:
    """Whether what the database calls `before` lies in `now`: it is not there any more, or some of it is here too."""
    return not os.path.isdir(before) or any(
        os.path.isdir(now + path.removeprefix(before)) for path in _paths(database, before)
    )


def _paths(database: sqlite3.Connection, root: str) -> Iterator[str]:
    for table, column in COLUMNS[1:3]:
        for (path,) in database.execute(f"SELECT {column} FROM {table}"):  # noqa: S608  # names of ours
            if path and path.startswith(f"{root}/"):
                yield path
