"""The records of a version: what programs compare and nobody reads, in two tags of JSON beside the few for people.

They are tags and not files because a retraining compares them for all versions of a model, and because checksums must
not lie beside the files that they are of. Versions of before November 2026 have a tag for each of the entries.
"""

import json
from collections.abc import Mapping

TAG, GATE_TAG = "olora.record", "olora.gate_record"
"""What the version is, written when it is registered, and what the gate has decided on."""
RUN = "olora.run_folder"
"""The folder of the run that made a version."""
ENTRIES = {
    TAG: frozenset(
        f"olora.{name}"
        for name in ("base_digest", "data_digest", "held_out_digest", "settings_digest", "checksums", "run_folder")
    ),
    GATE_TAG: frozenset({"olora.gate_against", "olora.gate_details"}),
}
"""Tag of a record -> the tags that are its entries."""


def folded(tags: Mapping[str, str], before: Mapping[str, str] | None = None) -> dict[str, str]:
    """The tags with those that nobody reads as records; entries that a version has had `before` stay."""
    whole, found = unfolded(tags), {}
    kept = unfolded(before or {})
    for record, names in ENTRIES.items():
        if new := {name: whole.pop(name) for name in names & whole.keys()}:
            found[record] = json.dumps({name: kept[name] for name in names & kept.keys()} | new, sort_keys=True)
    return whole | found


def unfolded(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags with the entries of the records among them, instead of these; an entry counts before a tag of its own.

    A record that is none, and what else is in one, is left out: somebody has written it by hand.
    """
    found = {name: text for name, text in tags.items() if name not in ENTRIES}
    for record, names in ENTRIES.items():
        found |= _entries(tags.get(record, "{}"), names)
    return found


def _entries(text: str, names: frozenset[str]) -> dict[str, str]:
    try:
        tree = json.loads(text)
        return {name: value for name, value in tree.items() if name in names and isinstance(value, str)}
    except (ValueError, AttributeError, RecursionError):
        return {}
