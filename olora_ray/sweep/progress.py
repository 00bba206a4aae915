"""progress.json: how long a search has run so far, over all attempts, and whether it is complete."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from olora_ray.common import storage

_FILE = "progress.json"
_REPORT = "leaderboard.json"


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
    if not (tree := _tree(storage.join(folder, _FILE))):
        tree = {"seconds": _tree(storage.join(folder, _REPORT)).get("seconds", 0.0)}
    try:
        return Progress(**{**tree, "seconds": float(tree["seconds"]), "cut": tuple(map(int, tree.get("cut", ())))})
    except (TypeError, ValueError, KeyError):
        return Progress()


def write(folder: str, progress: Progress) -> None:
    """Keep the progress of the search in `folder`."""
    storage.write_text(storage.join(folder, _FILE), json.dumps(asdict(progress)) + "\n")


def _tree(place: str) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or it is damaged."""
    try:
        tree = json.loads(storage.read_text(place))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
