import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison.record import Course, Ratio, Reached, reached

HISTORY = [
    {"step": 0.0, "eval/loss": 2.0},
    {"step": 1.0, "train/step_seconds": 2.0, "train/tokens_per_second": 50.0},
    {"step": 2.0, "train/step_seconds": 4.0, "train/tokens_per_second": 25.0, "eval/loss": 1.0},
    {"step": 3.0, "train/step_seconds": 1.0, "train/tokens_per_second": 100.0},
    {"step": 4.0, "train/step_seconds": 1.0, "train/tokens_per_second": 100.0, "eval/loss": 1.4},
    {"step": 6.0, "train/step_seconds": 2.0, "train/tokens_per_second": 100.0, "eval/loss": 0.6},
]


def test_the_course_has_what_was_spent_at_each_evaluation() -> None:
    found = Course.of(HISTORY)
    assert found.points() == ((0, 2.0), (2, 1.0), (4, 1.4), (6, 0.6))
    assert found.tokens == pytest.approx((0, 200, 400, 600))
    assert found.seconds == pytest.approx((0, 6, 8, 10))


@pytest.mark.parametrize(
    ("target", "steps", "tokens", "seconds"),
    [
        (2.5, 0, 0, 3),  # the base model is there already
        (1.5, 1, 100, 6),
        (1.0, 2, 200, 9),
        (0.8, 5, 500, 12),  # from the lowest so far, 1.0, not from 1.4
        (0.6, 6, 600, 13),
    ],
)
def test_a_loss_is_reached_between_two_evaluations(target: float, steps: float, tokens: float, seconds: float) -> None:
    found = reached(Course.of(HISTORY), target, initialisation=3.0)
    assert (found.reached, found.steps) == (True, pytest.approx(steps))
    assert (found.tokens, found.seconds) == pytest.approx((tokens, seconds))


def test_what_is_not_reached_is_censored() -> None:
    found = reached(Course.of(HISTORY), 0.5, 3.0)
    assert found == Reached(False, 6.0, pytest.approx(600), pytest.approx(13))  # type: ignore[arg-type]
    assert found.shown(found.steps) == ">6"
    assert reached(Course.of(HISTORY), 0.6, 3.0).shown(1234.4, " s") == "1,234 s"


@given(st.lists(st.floats(0.1, 9.0), min_size=2, max_size=8), st.floats(0.1, 9.0), st.floats(0.0, 1.0))
def test_a_lower_loss_takes_longer(losses: list[float], target: float, less: float) -> None:
    course = Course.of([{"step": 5.0 * place, "eval/loss": loss} for place, loss in enumerate(losses)])
    first, second = reached(course, target, 0.0), reached(course, target - less, 0.0)
    assert first.reached or not second.reached
    assert first.steps <= second.steps + 1e-9


def test_ratios_over_seeds() -> None:
    lora = [Reached(True, steps, 0, 0) for steps in (60.0, 50.0, 40.0)]
    own = [Reached(True, 30.0, 0, 0), Reached(True, 50.0, 0, 0), Reached(False, 64.0, 0, 0)]
    found = Ratio.of(own, lora)
    assert found == Ratio(1.0, 0.5, math.inf)
    assert found is not None
    assert found.shown() == "1.00 (0.50 .. never)"
    assert Ratio.of([], []) is None
