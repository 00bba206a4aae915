"""Progress lines say what a person wants to know."""

from typing import Any

import pytest

from olora_ray.pipeline.progress import Progress
from tests.said import said


def row(step: int, **changes: Any) -> dict[str, float]:
    return {
        "step": step,
        "train/loss": 1.5,
        "train/lr": 3e-4,
        "train/step_seconds": 2.0,
        "train/tokens_per_second": 100.0,
        "data/wait_fraction": 0.25,
        **changes,
    }


def lines(total: int, every: int, *rows: dict[str, float]) -> list[str]:
    with said() as told, Progress(total, every, bar=False) as progress:
        for item in rows:
            progress.row(item)
    return told


def test_a_line_every_few_steps_and_at_the_end() -> None:
    told = lines(7, 3, *(row(step) for step in range(1, 8)))
    assert [line.split(" | ")[0] for line in told] == ["step 3/7", "step 6/7", "step 7/7"]


def test_a_line_has_loss_rate_speed_and_the_time_left() -> None:
    (line,) = lines(4, 2, row(1), row(2))
    assert line == "step 2/4 | loss 1.5000 | lr 3.00e-04 | 100 supervised tok/s | data wait 25% | ETA 0:04"


def test_speed_and_waiting_are_those_of_the_steps_since_the_last_line() -> None:
    fast = row(3, **{"train/step_seconds": 1.0, "train/tokens_per_second": 400.0, "data/wait_fraction": 0.0})
    slow = row(4, **{"train/step_seconds": 3.0, "train/tokens_per_second": 200.0, "data/wait_fraction": 1.0})
    assert "250 supervised tok/s | data wait 75%" in lines(4, 2, row(1), row(2), fast, slow)[-1]


def test_evaluations_are_told_at_once() -> None:
    evaluation = {"step": 0.0, "eval/loss": 2.0, "eval/perplexity": 7.389}
    assert lines(4, 2, evaluation) == ["step 0/4 | eval loss 2.0000 | perplexity 7.39"]
    both = row(1, **{"eval/loss": 1.0, "eval/perplexity": 2.718})
    assert lines(4, 2, both) == ["step 1/4 | eval loss 1.0000 | perplexity 2.72"]


def test_a_bar_takes_the_place_of_step_lines_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with said() as told, Progress(3, 1, bar=True) as progress:
        for step in (1, 2, 3):
            progress.row(row(step))
        progress.line("a word")
    shown = capsys.readouterr().err
    assert told == []
    assert "3/3" in shown
    assert "loss 1.500" in shown
    assert "a word" in shown


def test_a_repeated_step_after_a_restart_does_not_move_the_bar_forward() -> None:
    with Progress(9, 1, bar=True) as progress:
        for step in (1, 2, 3, 2, 3, 4):
            progress.row(row(step))
        assert progress.bar is not None
        assert progress.bar.n == 4
