"""The digests behind paths and names of stores: what is on people's disks today must be found tomorrow."""

import hashlib
import json
from pathlib import Path

import pytest

from olora_ray.common import records, storage

FIXED = {"b": [1, 2.5, None], "a": {"ä": "x y"}}


def test_parts_are_joined_by_a_space() -> None:
    expected = hashlib.sha256(b"2 s3://b/k.jsonl 17 1700000000").hexdigest()
    assert storage.digest(2, "s3://b/k.jsonl", 17, 1700000000) == expected
    assert storage.digest(2, "s3://b/k.jsonl", 17, 1700000000, length=32) == expected[:32]
    assert storage.digest("s3://a/model", length=16) == "5cf23cedfa5eb8b7"


def test_json_has_sorted_keys() -> None:
    expected = hashlib.sha256(json.dumps(FIXED, sort_keys=True).encode()).hexdigest()
    assert storage.digest_json(FIXED) == expected == storage.digest_json(dict(reversed(FIXED.items())))
    assert storage.digest_json(FIXED, length=8) == "1bada249"
    assert json.loads(records.seal(FIXED))["seal"] == expected


@pytest.mark.parametrize("content", [b"", b"a\r\nb\0", b"x" * 3_000_000])
def test_a_file_and_its_bytes_have_one_digest(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert storage.digest_bytes(content) == expected
    assert storage.digest_file(tmp_path / "file") == expected
    assert storage.size_and_digest(tmp_path / "file") == {"bytes": len(content), "sha256": expected}
