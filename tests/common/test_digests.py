"""The digests behind paths and names of stores: what is on people's disks today must be found tomorrow."""

import hashlib
import json

from olora_ray.common import records, storage

FIXED = {"b": [1, 2.5, None], "a": {"ä": "x y"}}


def test_parts_are_joined_by_a_space() -> None:
    expected = hashlib.sha256(b"2 s3://b/k.jsonl 17 1700000000").hexdigest()
    assert storage.digest(2, "s3://b/k.jsonl", 17, 1700000000) == expected
    assert storage.digest(2, "s3://b/k.jsonl", 17, 1700000000, length=32) == expected[:32]
    assert storage.digest("s3://a/model", length=16) == "5cf23cedfa5eb8b7"


def test_json_has_sorted_keys() -> None:
    expected = hashlib.sha256(json.dumps(FIXED, sort_keys=True).encode()).hexdigest()
    assert (
        storage.digest_json(FIXED) == expected == storage.digest_json(dict(reversed(FIXED.items())))
    )
    assert storage.digest_json(FIXED, length=8) == "1bada249"
    assert json.loads(records.seal(FIXED))["seal"] == expected
