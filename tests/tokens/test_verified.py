"""A shard is hashed once a node; whatever was written to it since is noticed."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_bytes, digest_file
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.tokens import store as verified
from olora_ray.tokens.prepare import prepare
from olora_ray.tokens.store import TokenStore, Verified

CONTENT = b"some shard" * 100


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed; this node's notes are in a folder of the test, and made at once."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return digest_file(path)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(verified, "digest_file", noted)
    monkeypatch.setattr(verified, "SETTLED", -60.0)
    return names


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.arrow").write_bytes(CONTENT)
    return tmp_path / "a.arrow"


def test_a_file_is_hashed_once_a_node(path: Path, hashed: list[str]) -> None:
    sha256, here = digest_bytes(CONTENT), Verified("x")
    for _ in range(3):
        assert here.intact(path, sha256)
        assert Verified("x").intact(path, sha256)  # another process
    assert hashed == ["a.arrow"]
    assert not here.intact(path, digest_bytes(b"other"))
    assert here.intact(path, sha256)


def test_what_was_written_since_is_noticed(path: Path, hashed: list[str]) -> None:
    """In place, with the same size, and the times set back as `cp -p` does."""
    sha256, here, before = digest_bytes(CONTENT), Verified("x"), path.stat()
    assert here.intact(path, sha256)
    with path.open("r+b") as file:
        file.write(b"S")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not here.intact(path, sha256)
    assert not Verified("x").intact(path, sha256)
    path.write_bytes(CONTENT)
    assert here.intact(path, sha256)


def test_a_file_that_was_written_a_moment_ago_is_hashed_each_time(
    path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next change may show the same time."""
    monkeypatch.setattr(verified, "SETTLED", 10.0)
    here = Verified("x")
    assert all(here.intact(path, digest_bytes(CONTENT)) for _ in range(3))
    assert len(hashed) == 3


def test_nothing_is_believed_after_a_start_of_the_machine(
    path: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Verified("x").intact(path, digest_bytes(CONTENT))
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(verified, "BOOT", tmp_path / "boot")
    assert Verified("x").intact(path, digest_bytes(CONTENT))
    assert len(hashed) == 2
    notes = list(Path(tmp_path, "temporary").glob("*/verified/*.txt"))
    assert [each.name for each in notes] == ["x-another.txt"]


@pytest.mark.parametrize("damage", [b"", b"torn", b"\xff\x00\n\n"])
def test_damaged_notes_only_cost_time(damage: bytes, path: Path, hashed: list[str], tmp_path: Path) -> None:
    assert Verified("x").intact(path, digest_bytes(CONTENT))
    [notes] = Path(tmp_path, "temporary").glob("*/verified/*.txt")
    notes.write_bytes(damage)
    here = Verified("x")
    assert here.intact(path, digest_bytes(CONTENT))
    assert not here.intact(path, digest_bytes(b"other"))
    assert len(hashed) == 3


def test_without_a_folder_for_notes_each_opening_is_checked(
    path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    here = Verified("x")
    assert here.intact(path, digest_bytes(CONTENT))
    assert here.intact(path, digest_bytes(CONTENT))
    assert not here.intact(path, digest_bytes(b"other"))
    assert len(hashed) == 3


def test_notes_that_a_cleaner_of_temporary_files_takes_away_are_not_missed(
    path: Path, hashed: list[str], tmp_path: Path
) -> None:
    here = Verified("x")
    [folder] = Path(tmp_path, "temporary").glob("*/verified")
    shutil.rmtree(folder)
    assert here.intact(path, digest_bytes(CONTENT))
    assert here.intact(path, digest_bytes(CONTENT))
    assert len(hashed) == 2


def _verify(path: str, folder: str, start: Any, answers: Any) -> None:
    import tempfile

    names = []
    tempfile.tempdir = folder
    verified.SETTLED = -60.0
    real = verified.digest_file
    verified.digest_file = lambda file: names.append(file.name) or time.sleep(0.5) or real(file)
    here = Verified("x")
    start.wait(30)
    assert here.intact(Path(path), digest_bytes(CONTENT))
    answers.put(len(names))


def test_of_two_processes_at_the_same_time_one_reads(path: Path, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.Queue()
    job = (str(path), str(tmp_path / "temporary"), start, answers)
    processes = [context.Process(target=_verify, args=job) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in processes) == [0, 1]
    for process in processes:
        process.join(30)


def test_a_store_hashes_its_shards_once(corpus: Config, tiny_spec: TokenizerSpec, hashed: list[str]) -> None:
    store = prepare(corpus, tiny_spec, "train")
    for _ in range(2):
        reader = TokenStore.open(store.uri)
        assert [len(reader[index].input_ids) for index in range(len(reader))]
    assert sorted(hashed) == sorted(f"shard-{number:05d}.arrow" for number in range(12))
    shard = Path(store.uri, "shard-00003.arrow")
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    reader = TokenStore.open(store.uri)
    with pytest.raises(UserError, match=r"shard-00003\.arrow is damaged; delete this file"):
        _ = [reader[index] for index in range(len(reader))]
