"""The bootstrap of a paired difference keeps the laws that such an interval has."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.evaluation.rows import difference

VALUES = st.lists(st.tuples(*[st.floats(-10, 10)] * 2, st.floats(0.1, 10)), min_size=1, max_size=30)


def columns(rows: list[tuple[float, float, float]]) -> tuple[list[float], list[float], list[float]]:
    ours, theirs, weights = zip(*rows, strict=True)
    return list(ours), list(theirs), list(weights)


@given(VALUES)
def test_bounds_surround_the_middle_of_the_draws_and_swapping_turns_the_sign(
    rows: list[tuple[float, float, float]],
) -> None:
    ours, theirs, weights = columns(rows)
    there, back = difference(ours, theirs, weights, draws=200), difference(theirs, ours, weights, draws=200)
    assert there.mean == pytest.approx(np.average(np.subtract(ours, theirs), weights=weights), abs=1e-9)
    assert there.low <= there.high
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-9)


@given(VALUES, st.floats(-5, 5))
def test_a_row_that_is_hard_for_both_changes_nothing(rows: list[tuple[float, float, float]], shift: float) -> None:
    ours, _, weights = columns(rows)
    found = difference(ours, [value - shift for value in ours], weights, draws=50)
    assert (found.mean, found.low, found.high) == pytest.approx((shift, shift, shift), abs=1e-9)


@given(VALUES, st.floats(0.5, 20))
def test_only_the_proportions_of_weights_count(rows: list[tuple[float, float, float]], factor: float) -> None:
    ours, theirs, weights = columns(rows)
    first = difference(ours, theirs, weights, draws=100)
    second = difference(ours, theirs, [weight * factor for weight in weights], draws=100)
    assert (first.mean, first.low, first.high) == pytest.approx((second.mean, second.low, second.high), abs=1e-9)


def test_the_same_arguments_give_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(2, 57)).tolist()
    whole = difference(ours, theirs)
    assert whole == difference(ours, theirs)
    assert whole != difference(ours, theirs, seed=1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        hard = rng.normal(scale=5.0, size=80)  # for both: must not widen the interval
        ours, theirs = hard + 0.3 + rng.normal(size=80), hard + rng.normal(size=80)
        found = difference(ours.tolist(), theirs.tolist(), level=0.9, draws=400, seed=seed)
        covered += found.low <= 0.3 <= found.high
        assert found.high - found.low < 1.0
    assert 163 <= covered <= 197  # 180 expected, 4 standard deviations each way


@pytest.mark.parametrize(("groups", "level"), [(2, 0.95), (3, 0.95), (4, 0.95), (5, 0.95), (6, 0.95), (6, 0.99)])
def test_few_groups_are_covered_as_well(groups: int, level: float) -> None:
    """By the quantiles alone two groups hold the truth in half of the cases, three in 74 %, four in 87 %."""
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        values = rng.normal(size=groups)[np.arange(3 * groups) % groups]
        found = difference(values, np.zeros(3 * groups), None, level, 300, seed, groups=np.arange(3 * groups) % groups)
        assert found.low <= found.mean <= found.high
        covered += found.low <= 0.0 <= found.high
    expected, error = 200 * level, np.sqrt(200 * level * (1 - level))
    assert covered > expected - 4.5 * error


def test_two_groups_have_the_interval_of_students_t() -> None:
    found = difference([1.0, 2.0], [0.0, 0.0], draws=20_000)
    # standard error 0.5, and 12.706 of them with one degree of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((1.5, 1.5 - 6.353, 1.5 + 6.353), abs=0.1)
    assert difference([1.0] * 2, [0.0] * 2).low == 1.0, "without a spread there is no width"


def test_a_curve_is_applied_to_the_means_not_to_the_rows() -> None:
    found = difference([1.0, 3.0], [0.0, 2.0], of=np.exp, level=0.4)
    assert found.mean == pytest.approx(np.exp(2.0) - np.exp(1.0))
    assert found.low == pytest.approx(np.exp(1.0) - np.exp(0.0))  # only the first row drawn
    assert found.high == pytest.approx(np.exp(3.0) - np.exp(2.0))


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_rows_without_a_partner_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError):
        difference(ours, theirs)


def test_groups_are_drawn_as_a_whole() -> None:
    ours = np.repeat([1.0, 2.0, 6.0, 3.0], 5)
    grouped = difference(ours, np.zeros(20), groups=np.repeat([7, 3, 9, 1], 5))
    single = difference([1.0, 2.0, 6.0, 3.0], [0.0] * 4)
    assert (grouped.mean, grouped.low, grouped.high) == pytest.approx((single.mean, single.low, single.high), abs=0.2)
    assert grouped.low < 1.0 < 6.0 < grouped.high  # of four groups beyond them all
    assert difference(ours, np.zeros(20)).high < grouped.high
    one = difference(ours, np.zeros(20), groups=[0] * 20)
    assert (one.mean, one.low, one.high) == (3.0, 3.0, 3.0)


def test_more_groups_than_are_drawn_are_pooled_and_give_the_same_width() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0.3, 1.0, 100_000)
    found = difference(values, np.zeros(len(values)), rng.uniform(1, 200, len(values)))
    assert found.low < 0.3 < found.high
    # 2 x 1.96 standard errors, with the weights' own unevenness: E[w^2] / E[w]^2 = 4/3
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(4 / 3 / len(values)), rel=0.1)
