"""Folders and globs: ignored files are reported, no file is read twice, and no pipe is waited for."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.section import Source
from olora_ray.data import sources
from tests.data.reading import names
from tests.said import said


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_a_folder_has_beside_is_said_once(scheme: str, tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.jsonl",
        "b.jsonl.rar",
        "part-00001",
        "sub/part-00002",
        "e.xlsx",
        "f.parquet.gz",
        "d.jsonl.gz.gz",
    )
    touch(tmp_path, ".hidden", "_SUCCESS", "sub/.part.crc", "_temporary/x.bin")
    with said() as lines:
        for _ in range(2):
            assert names(f"{scheme}{tmp_path}") == ["a.jsonl"]
    assert len(lines) == 1
    assert lines[0].startswith(
        f"data.train.0.path: not read in {scheme}{tmp_path}: 1 .gz.gz, 1 .parquet.gz, 1 .rar, 1 .xlsx,"
        " 2 without suffix; supported: .jsonl, .json, .csv, .tsv, .txt and .md (each also with .gz, .zst, .bz2 or .xz)"
    )


def test_a_linked_folder_is_not_entered_and_that_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    with said() as lines:
        assert names(tmp_path / "data") == ["a.jsonl"]
    assert "1 linked folder" in lines[0]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_glob_that_matches_a_folder_and_what_is_in_it_reads_each_file_once(
    scheme: str, tmp_path: Path
) -> None:
    touch(tmp_path, "a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl")
    assert sorted(names(f"{scheme}{tmp_path}/**")) == ["a.jsonl", "b.jsonl", "c.jsonl"]


SPLITS: dict[str, tuple[list[str], list[str]]] = {
    "a snapshot of a hub": (
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["test-"],
    ),
    "lines": (
        ["train.jsonl", "test.jsonl", "README.txt", "dataset_infos.json"],
        ["test.", "README", "dataset_infos"],
    ),
    "folders": (["train/a.jsonl", "validation/b.jsonl"], ["b."]),
    "inside of a name": (
        ["squad_train.jsonl", "squad.dev2.jsonl", "Test.jsonl"],
        ["squad.dev2", "Test"],
    ),
    "no file for training": (["a.jsonl", "eval.jsonl", "unit-test-chats.jsonl"], ["eval"]),
    "feedback": (["pairs.jsonl", "held_out_pairs.jsonl", "heldout.jsonl"], ["held_", "heldo"]),
    "only held out": (["test.jsonl", "val.jsonl"], []),
    "other words": (["testimonials.jsonl", "developers.jsonl", "train.jsonl"], []),
    "one file": (["LICENSE.txt"], []),
    "manuals": (["pumps.md", "valves/open.md"], []),
    "notes": (["a.jsonl", "CHANGES.md"], ["CHANGES"]),
}


@pytest.mark.parametrize("pattern", ["", "/**"])
@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("case", SPLITS)
def test_files_of_another_split_are_left_out_and_named(
    case: str, scheme: str, pattern: str, tmp_path: Path
) -> None:
    # A test split was trained on without a warning.
    written, out = SPLITS[case]
    touch(tmp_path, *written)
    with said() as lines:
        found = names(f"{scheme}{tmp_path}{pattern}")
    left_out = {name.rpartition("/")[2] for name in written} - set(found)
    assert {name for name in left_out if name.startswith(tuple(out))} == left_out
    assert len(left_out) == len(out)
    assert all(
        any(f"{name} (" in line or f"{name}, " in line for line in lines) for name in left_out
    )
    # Where each split has its source, as `init` writes it, nothing is wrong.
    assert not any(line.startswith("warning: ") for line in lines)
    # They are used in a source of their own, and in data.eval.
    for name in written:
        assert names(f"{scheme}{tmp_path}/{name}") == [name.rpartition("/")[2]]
    other = Source(path=str(tmp_path), format="text")
    held_out = {
        file.uri.rpartition("/")[2] for file in sources.list_files(other, "data.eval.0", "")
    }
    notes = {"README.txt", "dataset_infos.json", "CHANGES.md"}
    assert left_out - notes <= held_out
    assert "train.jsonl" not in held_out


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("gone.jsonl")], ids=["pipe", "link"]
)
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.jsonl")
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(
            UserError, match=r"data\.train\.0\.path: .*a\.jsonl: neither a file nor a link to one"
        ):
            names(path)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ["", "{}", '{"_data_files": 3, "splits": 3}', "[" * 100_000])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_saved_data_set_that_is_damaged(
    scheme: str, content: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(
        UserError, match=r"data\.train\.0\.path: .*Dataset\.save_to_disk is damaged"
    ):
        names(f"{scheme}{tmp_path}")
