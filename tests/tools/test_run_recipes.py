"""The prompt with solved examples that a recipe is compared with."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import run_recipes


def chat(number: int, length: int) -> dict[str, Any]:
    turns = {"system": "s", "user": "?" * length, "assistant": str(number)}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([chat(n, 10) for n in range(12)], run_recipes.SHOTS),
        ([chat(n, run_recipes.LONGEST // 3) for n in range(12)], 2),
        ([chat(n, 2 * run_recipes.LONGEST) for n in range(12)], 1),
        ([{"text": "a report"}] * 12, 0),
    ],
)
def test_as_many_examples_are_shown_as_fit_and_none_before_texts(
    rows: list[dict[str, Any]], shown: int, tmp_path: Path
) -> None:
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_recipes.with_examples(tmp_path) == shown
    solved = tmp_path / "solved.jsonl"
    assert solved.exists() == bool(shown)
    for line in solved.read_text().splitlines() if shown else []:
        roles = [turn["role"] for turn in json.loads(line)["messages"]]
        assert roles == ["system", *["user", "assistant"] * (shown + 1)]


def test_the_page_of_all_recipes_has_the_numbers_of_their_pages() -> None:
    assert run_recipes.gallery()[0] == (run_recipes.RECIPES / "README.md").read_text(
        encoding="utf-8"
    )


def test_the_answers_of_a_finished_run_stand_before_and_after(tmp_path: Path) -> None:
    assert run_recipes.answers_of(tmp_path) == []
    rows = [chat(number, 10) for number in range(5)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tuned").mkdir()
    lines = [
        {"model": model, "origin": f"heldout.jsonl:{line}", "reference": "yes", "text": text}
        for model, text in (("run", "yes"), ("base", "no\nidea"))
        for line in range(1, 6)
    ]
    answers = tmp_path / "tuned" / "answers.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = run_recipes.answers_of(tmp_path)
    assert shown.count("before: no idea") == shown.count("after:  yes") == run_recipes.EXAMPLES
