"""JSON files with a digest of their content, so that a damaged one is noticed."""

import json
from typing import Any

from olora_ray.common import storage
from olora_ray.common.digests import digest_json


def seal(tree: dict[str, Any], indent: int | None = None) -> str:
    """The tree as JSON, with the digest of its content in it."""
    return json.dumps({**tree, "seal": digest_json(tree)}, indent=indent)


def unseal(text: str) -> dict[str, Any]:
    """Read `seal` back; raises ValueError if it is not what was written."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("not a JSON object")
    found = tree.pop("seal", None)
    if found != digest_json(tree):
        raise ValueError("not what was written: its seal does not fit")
    return tree


def read_sealed(place: str) -> dict[str, Any] | None:
    """A sealed file; None if it is damaged or not there."""
    try:
        return unseal(storage.read_text(place))
    except (FileNotFoundError, ValueError):
        return None
