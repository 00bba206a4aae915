"""The plan of benchmarks/settings.py."""

from collections import Counter
from typing import Any


def test_what_lasts_tunes_all_arms_on_the_first_task_with_headroom_and_three_on_the_next(
    benchmark: Any,
) -> None:
    settings = benchmark("settings")
    lines: list[Any] = []
    while training := settings.next_of_lasting(settings.Results(lines)):
        cell = training.cell
        # The body of a function is easy here: no headroom.
        loss = 0.4 if cell.task == "functions" else 999 / cell.steps
        lines.append({**vars(cell), **training._asdict(), "loss": loss})
    trained = Counter(line["task"] for line in lines)
    assert trained == {"functions": 2, "docstrings": 33, "dialogue": 13, "summary": 13}
