"""Sources on a real object store: keys with characters that have a meaning in a URI, and objects that change."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.common.errors import UserError
from olora_ray.data import scan
from olora_ray.data.reader import read_unit
from tests.data.reading import listed, texts
from tests.s3_server import Faults, Server

NAMES = [
    "plain.jsonl",
    "a b.jsonl",
    "a#b.jsonl",
    "a%23b.jsonl",
    "a%20b.jsonl",
    "a+b&c=d.jsonl",
    "süß.jsonl",
]


def put(server: Server, bucket: str, key: str, content: bytes) -> str:
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    server.client().put_object(Bucket=name, Key=f"{prefix}/{key}", Body=content)
    return f"{bucket}/{key}"


def row(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def test_keys_are_taken_letter_by_letter(s3_server: Server, bucket: str) -> None:
    for name in NAMES:
        put(s3_server, bucket, f"odd#folder/{name}", row(name))
    folder = f"{bucket}/odd#folder"
    for place in (folder, f"{folder}/*.jsonl", f"{bucket}/**/*.jsonl"):
        assert sorted(texts(listed(place))) == sorted(NAMES)
    for name in NAMES:
        assert texts(listed(f"{folder}/{name}")) == [name], "named alone"
        assert texts(listed(folder, only=(f"{folder}/{name}",))) == [name], "chosen by its URI"


def test_a_key_with_a_question_mark_is_refused(s3_server: Server, bucket: str) -> None:
    put(s3_server, bucket, "folder/is?it.jsonl", row("x"))
    message = (
        r"data\.train\.0\.path: s3://.*/folder: the key '.*is\?it\.jsonl' has a '\?'.*; rename it$"
    )
    with pytest.raises(UserError, match=message):
        listed(f"{bucket}/folder")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_object_that_changes_after_the_scan_is_not_read(
    kind: str, s3_server: Server, bucket: str, tmp_path: Path
) -> None:
    def content(word: str) -> bytes:
        if kind == "jsonl":
            return row(word) * 100
        parquet.write_table(pa.table({"text": [word] * 100}), tmp_path / "a.parquet")
        return (tmp_path / "a.parquet").read_bytes()

    [file] = listed(put(s3_server, bucket, f"a.{kind}", content("old")))
    found = scan.scan(file, "")
    assert texts([file]) == ["old"] * 100
    put(s3_server, bucket, f"a.{kind}", content("newer"))
    with pytest.raises(UserError):
        list(read_unit(file, found.units[0], found.columns, ["text"]))


def test_a_server_that_returns_another_range_is_noticed(s3_server: Server, bucket: str) -> None:
    [file] = listed(
        put(s3_server, bucket, "a.jsonl", b"".join(row(f"{n:05d}") for n in range(2000)))
    )
    found = scan.scan(file, "")
    s3_server.faults = Faults(wrong_ranges=True)
    assert len(list(read_unit(file, found.units[0], (), ["text"]))) == found.units[0].rows
    with pytest.raises(UserError):
        list(read_unit(file, found.units[-1], (), ["text"]))
