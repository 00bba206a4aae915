"""A large compressed file is decompressed once per node, and a copy of it is never trusted."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from olora_ray.data import reader, scan
from olora_ray.data.reader import Units
from olora_ray.data.sources import File
from tests.data.reading import listed

PACKS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
ROWS = [{"text": f"row {number}"} for number in range(4000)]


def content(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count files as large from 10 kB on."""
    monkeypatch.setattr(reader, "WORTH_IT", 10_000)
    monkeypatch.setattr(scan, "SLOW_UNIT_BYTES", 10_000)


@pytest.fixture
def packed(tmp_path: Path, temporary: Path) -> Path:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content(ROWS)))
    return path


def scanned(path: Path) -> tuple[File, Units]:
    [file] = listed(path)
    units = scan.scan(file, "").units
    assert len(units) > 8
    return file, units


def read(file: File, units: Any) -> list[Any]:
    return [row for unit in units for _, row in reader.read_unit(file, unit, (), ["text"])]


def copies(temporary: Path) -> list[Path]:
    return list(temporary.glob("*/unpacked/*.raw"))


@pytest.mark.parametrize("pack", PACKS)
def test_a_large_file_is_decompressed_once_for_all_its_units(
    pack: str, tmp_path: Path, temporary: Path
) -> None:
    path = tmp_path / f"a.jsonl.{pack}"
    path.write_bytes(PACKS[pack](content(ROWS)))
    file, units = scanned(path)
    assert read(file, reversed(units)) == [
        row for unit in reversed(units) for row in ROWS[unit.first :][: unit.rows]
    ]
    assert [copy.read_bytes() for copy in copies(temporary)] == [content(ROWS)]
    path.write_bytes(b"not read again")
    far = [unit for unit in units if unit.offset >= reader.WORTH_IT]
    assert read(file, far) == ROWS[far[0].first :]


def test_a_damaged_copy_is_not_used(packed: Path, temporary: Path) -> None:
    file, units = scanned(packed)
    assert read(file, units) == ROWS
    for damage in (lambda found: found.replace(b"row 39", b"row 93"), lambda found: found[:-10]):
        [copy] = copies(temporary)
        copy.write_bytes(damage(copy.read_bytes()))
        for _ in range(2):
            assert read(file, units) == ROWS


@pytest.mark.parametrize("folder", [True, False])
def test_without_room_or_a_folder_a_file_is_read_as_before(
    folder: bool, packed: Path, temporary: Path
) -> None:
    file, units = scanned(packed)
    if folder:
        file = dataclasses.replace(file, size=10**15)
    else:
        (temporary / f"olora_ray-{os.getuid()}").touch()
    assert read(file, units) == ROWS
    assert copies(temporary) == []
