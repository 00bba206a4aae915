"""Training uses the content that was hashed: a file of any type that changes in between is refused."""

import bz2
import gzip
import json
import lzma
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_ray.common import records
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.data import scan
from olora_ray.data.reader import Unit, read_unit
from olora_ray.data.sources import Changed, File
from olora_ray.tokens import prepare
from tests.data.reading import listed
from tests.tokens import helpers

MESSAGE = (
    "changed after it was scanned; run the same command again. If the error stays, give all nodes the same file"
    " at this path"
)


def lines_of(word: str, pack: Callable[[bytes], bytes] = bytes) -> Callable[[Path], Any]:
    content = "".join(json.dumps({"text": f"{word} {n:04d}"}) + "\n" for n in range(2000)).encode()
    return lambda path: path.write_bytes(pack(content))


def saved(word: str) -> Callable[[Path], Any]:
    import datasets

    return lambda path: datasets.Dataset.from_dict(
        {"text": [f"{word} {n:04d}" for n in range(200)]}
    ).save_to_disk(path)


def table(word: str) -> pa.Table:
    return pa.table({"text": [f"{word} {n:04d}" for n in range(2000)]})


KINDS: dict[str, Callable[[str], Callable[[Path], Any]]] = {
    "a.jsonl": lines_of,
    "a.jsonl.gz": lambda word: lines_of(word, gzip.compress),
    "a.jsonl.bz2": lambda word: lines_of(word, bz2.compress),
    "a.jsonl.xz": lambda word: lines_of(word, lzma.compress),
    "a.csv": lambda word: lambda path: path.write_text("text\n" + f"{word}\n" * 2000),
    "a.txt": lambda word: lambda path: path.write_text(f"{word}\n" * 2000),
    "a.json": lambda word: lambda path: path.write_text(json.dumps([{"text": word}] * 2000)),
    "a.parquet": lambda word: (
        lambda path: parquet.write_table(table(word), path, compression="none")
    ),
    "saved": saved,
}


def test_a_file_that_one_node_does_not_see_is_told_with_the_node(tmp_path: Path) -> None:
    # The message was "gone while it was read", although its owner saw the file.
    path = tmp_path / "a.jsonl"
    lines_of("word")(path)
    [file] = listed(path)
    unit = scan.scan(file, "").units[0]
    path.unlink()
    for attempt in (
        lambda: list(read_unit(file, unit, (), ("text",))),
        lambda: scan.scan(file, ""),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{path}: missing on node {socket.gethostname()}: it was removed after it was listed, or this node cannot"
            " see this path; put the file where all nodes see it"
        )


def read(file: File, units: Sequence[Unit], columns: tuple[str, ...]) -> list[str]:
    return [row["text"] for unit in units for _, row in read_unit(file, unit, columns, ["text"])]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_changes_after_the_scan_is_not_read(name: str, tmp_path: Path) -> None:
    KINDS[name]("old")(tmp_path / name)
    [file] = listed(tmp_path / name)
    found = scan.scan(file, "")
    os.utime(file.uri, ns=(5, 5))  # a copy: each node of a cluster may have unpacked it by itself
    assert all(text.startswith("old") for text in read(file, found.units, found.columns))
    KINDS[name]("new")(tmp_path / name)
    for unit in found.units:
        with pytest.raises(Changed, match=rf"{Path(file.uri).name}: {MESSAGE}$"):
            read(file, (unit,), found.columns)


def test_the_kept_scan_of_a_file_does_not_outlive_other_content_of_the_same_size_and_time(
    tmp_path: Path,
) -> None:
    # `cp -p` and `rsync -t` leave such files: without forgetting the scan, the same command would fail for ever.
    path = tmp_path / "a.jsonl"
    lines_of("old")(path)
    os.utime(path, (5, 5))  # a scan is not kept of a file that was changed a moment ago
    config = helpers.config(tmp_path / "runs", {"path": str(path), "format": "text"})
    prepare.begin(config, helpers.spec(), "train")
    lines_of("new")(path)
    os.utime(path, (5, 5))
    with pytest.raises(UserError):
        prepare.prepare(config, helpers.spec(), "train")
    assert all(
        "new" in text for text in helpers.texts(prepare.prepare(config, helpers.spec(), "train"))
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Config:
    """A folder of small files that have not changed for an hour."""
    for number in range(5):
        aged(helpers.write_jsonl(tmp_path / "chats" / f"{number}.jsonl", helpers.rows(20 + number)))
    return helpers.config(tmp_path / "runs", tmp_path / "chats")


def aged(path: Path, seconds: float = 3600.0) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def digests(config: Config) -> list[str]:
    return [file.sha256 for file in prepare.plan_here(config, helpers.spec(), "train").files]


def kept(config: Config) -> list[Path]:
    return sorted(Path(config.run.storage, "tokens", "scans").glob("*"))


def test_an_unchanged_corpus_is_not_read_again(corpus: Config) -> None:
    first = digests(corpus)
    assert len(kept(corpus)) == 5
    for path in kept(corpus):  # what is not read again has the digest that was kept
        path.write_text(
            records.seal(
                {**(records.read(str(path), dict[str, Any], sealed=True) or {}), "sha256": "kept"}
            )
        )
    assert digests(corpus) == ["kept"] * 5
    helpers.write_jsonl(Path(corpus.data.train[0].path, "3.jsonl"), helpers.rows(30))
    found = digests(corpus)
    assert found.pop(3) not in (first[3], "kept")
    assert found == ["kept"] * 4
    assert len(kept(corpus)) == 5  # a file has one, not one for each of its states


@pytest.mark.parametrize(
    "seconds", [1.0, -3600.0], ids=["a moment ago", "by a clock that is ahead"]
)
def test_no_scan_is_kept_of_a_file_that_was_just_changed(seconds: float, corpus: Config) -> None:
    # The next change may show the same time, because clocks of file systems are coarse.
    aged(Path(corpus.data.train[0].path, "3.jsonl"), seconds)
    digests(corpus)
    assert len(kept(corpus)) == 4
