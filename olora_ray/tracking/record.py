"""The record of a version: what programs compare and nobody reads, in one tag of JSON beside the few that people read.

It is a tag and not a file because a retraining compares it for all versions of a model, and because checksums must not
lie beside the files that they are of. Versions of before November 2026 have a tag for each of its entries.
"""

import json
from collections.abc import Mapping

TAG = "olora.record"
RUN = "olora.run_folder"
"""The folder of the run that made a version."""
ENTRIES = frozenset(
    f"olora.{name}"
    for name in ("base_digest", "data_digest", "held_out_digest", "settings_digest", "checksums", "run_folder")
)
"""The tags that are entries of the record."""


def folded(tags: Mapping[str, str], before: Mapping[str, str] | None = None) -> dict[str, str]:
    """The tags with those that nobody reads as one; entries that a version has had `before` stay."""
    kept = {name: text for name, text in unfolded(before or {}).items() if name in ENTRIES}
    whole = kept | unfolded(tags)
    entries = {name: text for name, text in whole.items() if name in ENTRIES}
    rest = {name: text for name, text in whole.items() if name not in ENTRIES}
    return rest | ({TAG: json.dumps(entries, sort_keys=True)} if entries else {})


def unfolded(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags with the record's entries among them, instead of the record; a tag of its own counts before an entry.

    Of a record that is none, or has other entries, these are left out: somebody has written it by hand.
    """
    rest = {name: text for name, text in tags.items() if name != TAG}
    return _entries(tags.get(TAG, "{}")) | rest


def _entries(text: str) -> dict[str, str]:
    try:
        tree = json.loads(text)
        return {name: value for name, value in tree.items() if name in ENTRIES and isinstance(value, str)}
    except (ValueError, AttributeError, RecursionError):
        return {}
