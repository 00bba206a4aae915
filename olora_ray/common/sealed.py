"""JSON files with a digest of their content, so that a damaged one is noticed."""

import hashlib
import json
from typing import Any

from olora_ray.common import storage


def seal(tree: dict[str, Any], indent: int | None = None) -> str:
    """The tree as JSON, with the digest of its content in it."""
    return json.dumps({**tree, "seal": _digest(tree)}, indent=indent)


def unseal(text: str) -> dict[str, Any]:
    """Read `seal` back; raises ValueError if it is not what was written."""
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError("not a JSON object")
    found = tree.pop("seal", None)
    if found != _digest(tree):
        raise ValueError("not what was written: its seal does not fit")
    return tree


def read_sealed(place: str) -> dict[str, Any] | None:
    """A sealed file; None if it is damaged or not there."""
    try:
        return unseal(storage.read_text(place))
    except (FileNotFoundError, ValueError):
        return None


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
