import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.contrib.evidence.conftest import PACKAGE, make_wheel

Script = Callable[[str], ModuleType]
Make = Callable[..., dict[str, list[dict[str, str]]]]


@pytest.fixture
def make(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Run the script on a package of the same shape; gives the rows of both files."""
    module = script("make_reasoning")
    file = make_wheel(tmp_path / "gym.whl", PACKAGE)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(
        module, "WHEEL", script("wheels").Wheel("reasoning-gym", "0", sha256, "Apache-2.0")
    )

    def run(*arguments: str, out: str = "out") -> dict[str, list[dict[str, str]]]:
        module.main(["--wheel", str(file), "--out", str(tmp_path / out), *arguments])
        names = ("train", "heldout")
        files = {
            name: (tmp_path / out / f"{name}.jsonl").read_text("utf-8").splitlines()
            for name in names
        }
        return {name: [json.loads(line) for line in lines] for name, lines in files.items()}

    return run


def test_rows_are_questions_with_their_solutions(make: Make, script: Script) -> None:
    rows = make("--rows", "60", "--heldout", "30")
    assert {name: len(found) for name, found in rows.items()} == {"train": 60, "heldout": 30}
    for row in rows["train"] + rows["heldout"]:
        assert row["prompt"].endswith("How many?\n" + script("make_reasoning").INSTRUCTION)
        scores = script("scorers").final_number(row["completion"], row["completion"])
        assert scores == {"exact_match": 1.0, "last_number": 1.0}


def test_no_question_is_in_both_files_under_another_name(make: Make) -> None:
    rows = make("--rows", "300", "--heldout", "100")
    keys = [
        (row["prompt"].partition(":")[0], *re.findall(r"\d+", row["completion"]))
        for row in rows["train"] + rows["heldout"]
    ]
    assert len(set(keys)) == 400
    assert len({row["group"] for row in rows["train"] + rows["heldout"]}) == 400


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(make: Make) -> None:
    first = make("--rows", "20", "--heldout", "20", out="a")
    assert make("--rows", "20", "--heldout", "20", out="b") == first
    assert make("--rows", "40", "--heldout", "20", out="c")["heldout"] == first["heldout"]
    other = make("--rows", "20", "--heldout", "20", "--seed", "1000", out="d")
    assert not {row["prompt"] for row in other["train"]} & {row["prompt"] for row in first["train"]}
