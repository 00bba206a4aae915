"""The state that Ray Tune keeps of a search, and the number that says whether this code can resume from it.

<search>/tune/       Tune's own files: pickles that name classes and functions of olora_ray.sweep
<search>/tune.json   the FORMAT of the code that began the search
"""

import fnmatch
import json
from dataclasses import asdict, dataclass
from typing import Any

from olora_ray.common import storage
from olora_ray.common.errors import UserError

FORMAT = 2
"""Raise it when what Tune pickles is moved, renamed, or has other attributes; tests/sweep/test_state.py lists it."""
TUNE = "tune"
_FILE = "tune.json"
_STATES = "experiment_state-*.json"
"""One for each attempt; Tune resumes from the last of them by name."""
_PICKLE = f"{TUNE}/tuner.pkl"
"""Without it Tune begins anew."""
_REPORT = "leaderboard.json"
"""Written when a search has ended."""


def place(folder: str) -> str:
    """Tune's folder in that of the search."""
    return storage.join(folder, TUNE)


def begun(folder: str) -> bool:
    """Whether Tune has written its state of a search into this folder."""
    return storage.exists(storage.join(folder, _PICKLE))


def begin(folder: str) -> None:
    """Note the format of a search that begins; must come before Tune's first file."""
    storage.write_text(storage.join(folder, _FILE), json.dumps({"format": FORMAT}) + "\n")


def lost(folder: str) -> bool:
    """Whether Tune has begun a search and left nothing to resume from: it was killed before that, or in a write."""
    if not begun(folder):
        return False
    states = fnmatch.filter(storage.names(place(folder)), _STATES)
    try:
        return not states or not json.loads(storage.read_text(storage.join(place(folder), max(states))))["trial_data"]
    except (ValueError, KeyError, TypeError):
        return True


def not_resumed(folder: str) -> UserError:
    """What to raise for a search that Tune cannot resume, which it says in its own log alone."""
    return UserError(
        f"run.name: Ray Tune cannot resume the search in {folder}: what it has kept is damaged, or of another version"
        " of Ray or Optuna; choose another run.name (the trials of this one stay readable under"
        f" {storage.join(folder, 'trials')}), or delete the folder"
    )


def can_resume(folder: str) -> bool:
    """False for a search that another version of this code began and ended: there is only to report.

    True if there is none. Raises UserError for one that such a version began and did not end.
    """
    if not begun(folder) or _format(folder) == FORMAT:
        return True
    if storage.exists(storage.join(folder, _REPORT)):
        return False
    raise UserError(
        f"run.name: {folder} holds an unfinished search of another version of olora_ray, which this one cannot resume;"
        f" choose another run.name (its finished trials stay readable under {storage.join(folder, 'trials')}), or"
        " delete the folder"
    )


def _format(folder: str) -> int | None:
    """None for a search from before there was a number, and for a file that cannot be read."""
    try:
        return int(json.loads(storage.read_text(storage.join(folder, _FILE)))["format"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # the last: of 1e999
        return None


# progress.json: how long a search has run so far, over all attempts, and whether it is complete.


_PROGRESS = "progress.json"
_LEADERBOARD = "leaderboard.json"


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


def read(folder: str) -> Progress:
    """The progress of the search in `folder`; of one that ended before there was this file, what its report says."""
    if not (tree := _tree(storage.join(folder, _PROGRESS))):
        tree = {"seconds": _tree(storage.join(folder, _LEADERBOARD)).get("seconds", 0.0)}
    try:
        return Progress(**{**tree, "seconds": float(tree["seconds"]), "cut": tuple(map(int, tree.get("cut", ())))})
    except (TypeError, ValueError, KeyError):
        return Progress()


def write(folder: str, progress: Progress) -> None:
    """Keep the progress of the search in `folder`."""
    storage.write_text(storage.join(folder, _PROGRESS), json.dumps(asdict(progress)) + "\n")


def _tree(place: str) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or it is damaged."""
    try:
        tree = json.loads(storage.read_text(place))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
