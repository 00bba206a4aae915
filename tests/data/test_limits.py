"""Limits of memory: a small file may unpack to gigabytes."""

import gzip
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.data import reader, scan
from olora_ray.data.reader import FileScan
from tests.data.reading import listed


def scanned(path: Path) -> FileScan:
    [file] = listed(path)
    return scan.scan(file, "")


LONG: dict[str, tuple[bytes, str]] = {
    "a.jsonl": (
        b'{"a": 1}\n' * 20 + b"[" * 1500 + b"\n{}\n",
        r"a\.jsonl:21: a row of more than 0 MiB; split or remove it$",
    ),
    "end.jsonl": (b'{"a": 1}\n{"a": "' + b"x" * 1500, r"end\.jsonl:2: a row of more than"),
    "a.txt": (b"x" * 3000, r"a\.txt:1: a row of more than"),
    "line.csv": (
        b"a,b\n1,2\n" + b"x" * 1500 + b",2\n",
        r"line\.csv:3: .*\(is a quoted cell not closed\?\)",
    ),
    "record.csv": (b'a,b\n1,2\n3,"' + b"x\n" * 600 + b'"\n', r"record\.csv:3: a row of more than"),
    "open.csv": (b'a,b\n1,2\n3,"' + b"x,y\n" * 600, r"open\.csv:3: a row of more than"),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("pack", [None, gzip.compress])
def test_a_row_that_is_too_long(
    name: str,
    pack: Callable[[bytes], bytes] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scan, "LINE_BYTES", 1000)
    monkeypatch.setattr(scan, "CHUNK", 64)
    content, message = LONG[name]
    path = tmp_path / (f"{name}.gz" if pack else name)
    path.write_bytes(pack(content) if pack else content)
    with pytest.raises(UserError, match=message.replace(r":", r"(\.gz)?:", 1)) as caught:
        scanned(path)
    assert "\n" not in str(caught.value)
    (tmp_path / "below.jsonl").write_bytes(b'"' + b"x" * 997 + b'"\n')
    assert scanned(tmp_path / "below.jsonl").rows == 1


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_file_that_is_too_large(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "JSON_BYTES", 2**20)
    content = b"[" + b" " * 2**20 + b"]"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(
        UserError, match=r"a\.json(\.gz)?: more than 1 MiB, .*; write it as \.jsonl"
    ):
        scanned(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.txt.gz"])
def test_a_bomb_needs_no_more_memory_than_the_limit(name: str, tmp_path: Path) -> None:
    block = gzip.compress(b" " * 2**25, 1)
    (tmp_path / name).write_bytes(block * 40)  # 1.3 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        scanned(tmp_path / name)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 600 * 2**10
