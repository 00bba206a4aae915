"""An unchanged file is not read again, whatever its size; a changed one always is."""

import os
import time
from pathlib import Path

import pytest

from olora_ray.config.schema import Config
from olora_ray.data import scan
from olora_ray.data.reader import FileScan
from olora_ray.data.sources import File
from olora_ray.tokens import preview
from olora_ray.tokens.prepare import plan_here
from tests.tokens import helpers


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A folder of small files that nobody has changed for an hour."""
    for number in range(5):
        aged(helpers.write_jsonl(tmp_path / "chats" / f"{number}.jsonl", helpers.rows(20 + number)))
    return helpers.config(tmp_path / "runs", tmp_path / "chats")


def aged(path: Path, seconds: float = 3600.0) -> None:
    at = time.time() - seconds
    os.utime(path, (at, at))


def digest(config: Config) -> str:
    return plan_here(config, helpers.spec(), "train").digest()


def kept(config: Config) -> list[Path]:
    return sorted(Path(config.run.storage, "tokens", "scans").glob("*"))


def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are scanned from now on."""
    names: list[str] = []
    scan_it = scan._scan

    def noted(file: File) -> FileScan:
        names.append(Path(file.uri).name)
        return scan_it(file)

    monkeypatch.setattr(scan, "_scan", noted)
    return names


@pytest.mark.parametrize("large_from", [1, 2**40], ids=["large files", "small files"])
def test_an_unchanged_corpus_is_not_read_again(
    large_from: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "BELIEVED_FROM", large_from)
    first = digest(config)
    assert len(kept(config)) == 5
    names = read(monkeypatch)
    assert digest(config) == first
    assert names == []
    plan = plan_here(config, helpers.spec(), "train")
    assert [len(shard) for shard in plan.shards]  # the units are kept as well
    helpers.write_jsonl(Path(config.data.train[0].path, "3.jsonl"), helpers.rows(30))
    assert digest(config) != first
    assert names == ["3.jsonl"]
    assert len(kept(config)) == 5  # a file has one, not one for each of its states


def test_a_file_that_was_changed_a_moment_ago_is_read_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of its next change may be the same: clocks of file systems are coarse."""
    path = Path(config.data.train[0].path, "3.jsonl")
    aged(path, 1.0)
    digest(config)
    names = read(monkeypatch)
    digest(config)
    assert names == ["3.jsonl"]
    aged(path, -3600.0)  # a file server whose clock is ahead
    digest(config)
    digest(config)
    assert names == ["3.jsonl"] * 3


@pytest.mark.parametrize("believed", [False, True], ids=["small", "large"])
def test_other_content_of_the_same_size_and_time(
    believed: bool, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `cp -p` and `rsync -t` leave it: seen by the inode. Of a large file each node may have its own copy."""
    monkeypatch.setattr(scan, "BELIEVED_FROM", 1 if believed else 2**40)
    path = Path(config.data.train[0].path, "3.jsonl")
    first, before = digest(config), path.stat()
    path.write_text(path.read_text().replace("q1", "q2"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert (digest(config) == first) == believed


def test_a_dry_run_writes_nothing(config: Config) -> None:
    preview.describe(config, helpers.spec())
    assert not Path(config.run.storage).exists()
