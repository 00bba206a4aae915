"""A large compressed file is decompressed once a node, and a copy of it is never trusted."""

import bz2
import errno
import gzip
import json
import lzma
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from olora_ray.common import node_cache
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Source
from olora_ray.data import reader, scan, sources
from olora_ray.data.sources import Changed, File
from olora_ray.data.units import Units

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
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files are large from 10 kB on, and the node's folder is one of the test."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(reader, "WORTH_IT", 10_000)
    monkeypatch.setattr(reader, "CHUNK", 4096)
    monkeypatch.setattr(scan, "SLOW_UNIT_BYTES", 10_000)
    return tmp_path / "temporary"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each time that a file is opened to be decompressed."""
    names: list[str] = []
    opened = reader.open_stream

    def noted(file: File, *more: Any) -> Any:
        names.append(Path(file.uri).name)
        return opened(file, *more)

    monkeypatch.setattr(reader, "open_stream", noted)
    return names


def scanned(path: Path) -> tuple[File, Units]:
    [file] = sources.list_files(Source(path=str(path), format="text"), "data.train.0", "")
    units = scan.scan(file, "").units
    assert len(units) > 8
    return file, units


def read(file: File, units: Any) -> list[Any]:
    return [row for unit in units for _, row in reader.read_unit(file, unit, (), ["text"])]


def copies(temporary: Path) -> list[Path]:
    return list(temporary.glob("*/unpacked/*.raw"))


@pytest.mark.parametrize("pack", PACKS)
def test_a_large_file_is_decompressed_once_for_all_its_units(pack: str, tmp_path: Path, passes: list[str]) -> None:
    path = tmp_path / f"a.jsonl.{pack}"
    path.write_bytes(PACKS[pack](content(ROWS)))
    file, units = scanned(path)
    passes.clear()
    assert read(file, reversed(units)) == [row for unit in reversed(units) for row in ROWS[unit.first :][: unit.rows]]
    assert len(passes) == 1
    assert [copy.read_bytes() for copy in copies(tmp_path / "temporary")] == [content(ROWS)]


def test_a_small_file_is_not_copied(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WORTH_IT", 10**6)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content(ROWS)))
    assert read(*scanned(tmp_path / "a.jsonl.gz")) == ROWS
    assert copies(temporary) == []


def test_a_damaged_copy_is_not_used(tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content(ROWS)))
    file, units = scanned(tmp_path / "a.jsonl.gz")
    assert read(file, units) == ROWS
    for damage in (lambda found: found.replace(b"row 39", b"row 93"), lambda found: found[:-10]):
        [copy] = copies(temporary)
        copy.write_bytes(damage(copy.read_bytes()))
        assert [read(file, units), read(file, units)] == [ROWS, ROWS]
        assert copies(temporary)[0].read_bytes() == content(ROWS)  # made anew


def test_a_file_that_changes_before_it_is_copied_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content(ROWS)))
    file, units = scanned(path)
    path.write_bytes(gzip.compress(content(list(reversed(ROWS)))))
    with pytest.raises(Changed):
        read(file, units[-1:])


def test_a_file_that_is_damaged_in_its_middle_is_named(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(content(ROWS))
    path.write_bytes(packed)
    file, units = scanned(path)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
        read(file, units[-1:])
    assert [each.name for each in temporary.glob("*/unpacked/*") if not each.name.endswith(".lock")] == []


def _small_part(room: reader._Room) -> int:
    return 20_000 - sum(each.stat().st_size for each in room._folder.glob(".*.tmp"))


class _FullDisk:
    def write(self, chunk: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def _on_a_full_disk(taken: Callable[[Any, bytes], bool], copy: Any, chunk: bytes) -> bool:
    return taken(copy if copy.tell() < 20_000 else _FullDisk(), chunk)


@pytest.mark.parametrize("full", [False, True])
def test_without_room_a_file_is_read_as_before(
    tmp_path: Path, temporary: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    if full:
        monkeypatch.setattr(reader, "_has_taken", partial(_on_a_full_disk, reader._has_taken))
    else:
        monkeypatch.setattr(reader._Room, "left", _small_part)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content(ROWS)))
    file, units = scanned(tmp_path / "a.jsonl.gz")
    passes.clear()
    assert read(file, units) == ROWS
    assert copies(temporary) == []
    tries = sum(unit.offset >= reader.WORTH_IT for unit in units)
    assert len(passes) == len(units) + tries  # each opened in vain, but read through at most once


def test_what_others_are_writing_takes_room_too(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": int(1000 / node_cache.SHARE), "free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    room = reader._Room(temporary)
    assert room.left() == 1000
    (temporary / ".other.raw.0.tmp").write_bytes(bytes(300))
    (temporary / "third.raw").write_bytes(bytes(200))
    assert room.left() == 500
    usage.free = 5_100  # others have taken the rest
    assert room.left() == 100


def test_only_what_was_left_behind_makes_room(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of more than fits would else be unpacked again and again."""
    total = len(content(ROWS))
    usage = type("Usage", (), {"total": int(1.5 * total / node_cache.SHARE), "free": 10 * total})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content(ROWS)))
    assert read(*scanned(tmp_path / "a.jsonl.gz")) == ROWS
    [first] = copies(temporary)
    assert read(*scanned(tmp_path / "b.jsonl.gz")) == ROWS
    assert copies(temporary) == [first]
    for path in first.parent.iterdir():
        os.utime(path, (5, 5))
    assert read(*scanned(tmp_path / "b.jsonl.gz")) == ROWS
    assert len(copies(temporary)) == 1
    assert copies(temporary) != [first]


def test_without_a_folder_a_file_is_read_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content(ROWS)))
    assert read(*scanned(tmp_path / "a.jsonl.gz")) == ROWS


def _read_all(path: str, start: Any, answers: Any) -> None:
    names: list[str] = []
    made = reader._write
    reader._write = lambda *arguments: names.append("made") or time.sleep(0.5) or made(*arguments)
    file, units = scanned(Path(path))
    start.wait(30)
    assert read(file, reversed(units)) == [row for unit in reversed(units) for row in ROWS[unit.first :][: unit.rows]]
    answers.put(len(names))


def test_of_two_processes_one_makes_the_copy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content(ROWS)))
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_read_all, args=(str(tmp_path / "a.jsonl.gz"), start, answers)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in processes) == [0, 1]
    for process in processes:
        process.join(30)
