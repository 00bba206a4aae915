"""The tuned rate on invented losses: the lowest point of a parabola, and what is said of it."""

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison.tuning import Tuned, tuned

GRID = (0.25, 0.5, 1.0, 2.0, 4.0)


def bowl(best: float, curvature: float = 0.03) -> dict[float, float]:
    return {factor: 1 + curvature * math.log2(factor / best) ** 2 for factor in GRID}


def found(losses: Mapping[float, float], base: float = 9.0) -> Tuned:
    point = tuned(losses, base)
    assert point is not None
    return point


@given(st.floats(-1.4, 1.4), st.floats(0.01, 1.0))
def test_the_lowest_point_of_a_parabola_is_found(octaves: float, curvature: float) -> None:
    point = found(bowl(2.0**octaves, curvature))
    assert point.inside
    assert point.factor == pytest.approx(2.0**octaves, rel=0.06)  # two digits


@given(st.lists(st.one_of(st.floats(0.1, 9.0), st.just(math.inf)), min_size=5, max_size=5))
def test_the_rate_stays_within_half_a_step_of_the_best_point(values: list[float]) -> None:
    losses = dict(zip(GRID, values, strict=True))
    point = tuned(losses, 9.0)
    if point is None:
        assert min(values) == math.inf
        return
    best = min(GRID, key=lambda factor: losses[factor])
    assert abs(math.log2(point.factor / best)) <= 0.5 + 0.06
    assert point.loss == min(values)


def test_a_neighbour_that_broke_off_moves_the_rate_away_from_it() -> None:
    losses = {0.25: 1.1, 0.5: 1.05, 1.0: 1.0, 2.0: math.inf, 4.0: math.inf}
    assert found(losses).factor == pytest.approx(2**-0.5, abs=0.01)
    assert (found(losses).diverged, found(losses, base=1.02).diverged) == (2, 4)
